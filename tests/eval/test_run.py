"""python -m eval.run on a tiny model: its files, how it resumes, and when its gate fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval import run
from eval.answers import responses
from recipes.common import cli as recipe_cli
from tests.eval.conftest import run_eval

TASKS = "eval.tasks=[arc_easy,lambada_openai,wikitext]"
VARIANTS = "variants=[{name:ring,mesh:{ring:2}},{name:dropped,mesh:{tp:3},spd:{drop:ranked,budget:1.0}}]"


@dataclass(frozen=True)
class FinishedRun:
    """A run that compared two variants: its settings, its folder, and how it ended."""

    settings: tuple[str, ...]
    out: Path
    code: object
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def compared(tiny: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    out = tmp_path_factory.mktemp("runs") / "compared"
    rules = ("eval.sensitivity=1", "eval.gate=[dropped]", "eval.strict=true", "eval.resamples=200")
    settings = (f"model={tiny}", TASKS, f"eval.data={sets}", *rules, VARIANTS)
    return FinishedRun(settings, out, *run_eval(*settings, f"out={out}"))


@pytest.fixture
def resumed(compared: FinishedRun, tmp_path: Path) -> tuple[Callable[..., tuple[object, str, str]], Path]:
    """A copy of the finished run's folder, and ``resume(*changes)``, which runs the same command in it."""
    out = shutil.copytree(compared.out, tmp_path / "copy")
    return lambda *changes: run_eval(*compared.settings, f"out={out}", *changes), out


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_variants_are_compared_and_a_strict_gate_fails(compared):
    """A verdict on so few examples is undecided, which a strict gate refuses."""
    assert (compared.code, compared.stdout) == (run.GATE_FAILED, ""), compared.stderr
    report = report_of(compared.out)
    assert list(report["tasks"]) == ["arc_easy", "lambada_openai", "wikitext"]
    assert report["variants"]["dropped"]["reduce"] == "float32"
    for task, n in (("arc_easy", 13), ("lambada_openai", 11)):
        assert report["tasks"][task]["baseline"]["verdict"] is None
        for name in ("ring", "dropped"):
            figures = report["tasks"][task][name]
            assert figures["n"] == n and figures["low"] <= figures["difference"] <= figures["high"]
            assert figures["verdict"] and 0 <= figures["accuracy"] <= 1 and 0 < figures["p_mcnemar"] <= 1
    same = report["tasks"]["arc_easy"]["ring"]
    assert (same["lost"], same["won"], same["difference"]) == (0, 0, 0.0), "context parallelism changes no score"
    texts = report["tasks"]["wikitext"]
    assert abs(texts["ring"]["difference"]) < 1e-5 < abs(texts["dropped"]["difference"])
    assert texts["ring"]["accuracy"] is None and texts["ring"]["perplexity"] > 1
    assert [variant["dropped"] for variant in report["variants"].values()] == [0.0, 0.0, 1.0]
    assert report["gate"] == {"variants": ["dropped"], "strict": True, "failed": ["dropped"], "passed": False}


def test_run_writes_page_pictures_and_manifest(compared):
    report, out = report_of(compared.out), compared.out
    page = (out / "report.md").read_text()
    assert "FAILED by dropped" in page and "![accuracy](accuracy.svg)" in page
    assert all(f"| {task}" in page for task in report["tasks"])
    assert "<svg" in (out / "accuracy.svg").read_text() and (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    files = json.loads((out / "manifest.json").read_text())["data"]
    assert [Path(name).name for name in files] == ["arc_easy.jsonl", "lambada_openai.jsonl", "wiki.test.raw"]
    assert "gate failed: dropped" in compared.stderr and len(list((out / "responses").iterdir())) == 3


def test_same_command_again_asks_nothing(resumed, monkeypatch):
    resume, out = resumed
    before = report_of(out)
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert resume()[0] == run.GATE_FAILED
    after = report_of(out)
    assert all(after[name] == before[name] for name in ("tasks", "average", "variants"))
    code, _, err = resume("eval.gate=[ring]", "eval.strict=false")
    assert code == 0, err


def test_report_names_the_commits_of_all_answers(resumed, monkeypatch):
    resume, out = resumed
    before = report_of(out)["commit"]
    assert "of another commit" not in resume()[2]
    monkeypatch.setattr(run, "commit_of", lambda _: "000000000000")
    _, _, err = resume()
    assert f"has answers of another commit, {before}, which are used: to ask all again, use another out=" in err
    assert report_of(out)["commit"] == f"000000000000, {before}"
    assert f"commit: 000000000000, {before}" in (out / "report.md").read_text()


def test_corrupt_answer_is_named_and_computed_again(resumed):
    resume, out = resumed
    before = report_of(out)
    file = next((out / "responses").iterdir())
    lines = file.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"answer": [' in line)
    lines[at] = lines[at].replace('"answer": [-', '"answer": [-9')
    file.write_text("\n".join(lines) + "\n")
    _, _, err = resume()
    assert f"{file}, line {at + 1} is corrupt: its answer is computed again" in err
    assert ": 1 of " in err
    assert "is corrupt" not in resume()[2], "the line is gone"
    assert report_of(out)["average"] == before["average"]


@pytest.fixture(scope="module")
def one_by_one(tiny: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], dict]:
    """Settings that answer one request at a time, and the report's tasks of an uninterrupted run with them."""
    small = ("eval.tasks=[arc_easy,lambada_openai]", "eval.max_batch_tokens=1", "run.threads=1")
    words, out = (f"model={tiny}", f"eval.data={sets}", *small), tmp_path_factory.mktemp("whole") / "run"
    code, _, err = run_eval(*words, f"out={out}")
    assert code == 0, err
    return words, report_of(out)["tasks"]


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, recipe_cli.STOPPED)])
def test_interrupted_run_asks_only_what_is_missing(one_by_one, tmp_path, ending, code):
    """Kill the run, or ask it to stop, after some answers; resumed, it ends as an uninterrupted run does."""
    words, tasks = one_by_one
    command = [sys.executable, "-m", "eval.run", *words, f"out={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    answers = tmp_path / "killed" / "responses"
    deadline = time.monotonic() + 300
    while not any(file.read_bytes().count(b"answer") > 3 for file in answers.glob("*")):
        assert time.monotonic() < deadline and process.poll() is None, "no answers came"
        time.sleep(0.01)
    while process.poll() is None:
        os.killpg(process.pid, ending)
        time.sleep(0.05)
    assert process.returncode == code
    (file,) = answers.iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:7])  # as after a kill in the middle of a line
    code, _, err = run_eval(*words, f"out={tmp_path / 'killed'}")
    assert code == 0, err
    missing, total = map(int, re.search(r"(\d+) of (\d+) requests to answer", err).groups())
    assert missing == total - sum(b"answer" in line for line in lines[:3]) < total
    assert report_of(tmp_path / "killed")["tasks"] == tasks


def test_long_texts_are_answered_on_every_mesh_and_with_blocks_dropped(tiny, tmp_path):
    """Generated texts: on a ring equal to those of one rank, to the letter."""
    variants = "variants=[{name:ring,mesh:{ring:2}},{name:dropped,mesh:{tp:3},spd:{drop:all}}]"
    # With this seed, four names are short enough for a text of so few bytes.
    words = (
        "eval.tasks=[needle,multikey]",
        "eval.lengths=[397]",
        "eval.limit=2",
        "eval.seed=2",
        "run.threads=1",
        variants,
    )
    code, _, err = run_eval(f"model={tiny}", *words, f"out={tmp_path}")
    assert code == 0, err
    tasks = report_of(tmp_path)["tasks"]
    assert {name: {variant: one["n"] for variant, one in by_variant.items()} for name, by_variant in tasks.items()} == {
        name: {"baseline": 2, "ring": 2, "dropped": 2} for name in ("needle_397", "multikey_397")
    }
    stored = [responses.read(file).answers for file in (tmp_path / "responses").iterdir()]
    assert all(isinstance(text, str) and len(answers) == 4 for answers in stored for text in answers.values())
    different = {str(sorted(answers.items())) for answers in stored}
    assert len(different) == 2, "the ring's are the baseline's, those of dropped blocks differ"
