"""python -m eval.run on a tiny model: what it writes, how it goes on, when it refuses, when its gate fails."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from eval import run, speed
from eval.answers import responses
from eval.answers.worker import EvalWork, _refuse_no_numbers
from eval.harness.local import LOCAL
from longctx.hf.config import shape_of
from recipes.common import cli as recipe_cli
from recipes.common import overrides
from tests.tiny import tiny_model

CHOICES = ["a stone", "a cloud", "a boat", "a song"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data of our own making: two tasks of accuracy, one of perplexity."""
    folder = tmp_path_factory.mktemp("sets")

    def write(name: str, rows: list[dict]) -> None:
        file = folder / LOCAL[name].file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "arc_easy", [{"query": f"Question: What is number {i}?", "choices": CHOICES, "gold": i % 4} for i in range(13)]
    )
    write("lambada_openai", [{"context": f"Down the river went {i}", "continuation": "men"} for i in range(11)])
    pages = folder / LOCAL["wikitext"].file
    pages.parent.mkdir()
    pages.write_text(" = Boats = \n \n Boats float .\n = Songs = \n \n A song is sung .\n")
    return folder


TASKS = "eval.tasks=[arc_easy,lambada_openai,wikitext]"
VARIANTS = "variants=[{name:ring,mesh:{ring:2}},{name:dropped,mesh:{tp:3},spd:{drop:ranked,budget:1.0}}]"


@pytest.fixture(scope="module")
def compared(tiny: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path]:
    out = tmp_path_factory.mktemp("runs") / "compared"
    settings = ("eval.sensitivity=1", "eval.gate=[dropped]", "eval.strict=true", "eval.resamples=200")
    return (f"model={tiny}", TASKS, f"eval.data={sets}", *settings, VARIANTS, f"out={out}"), out


def test_variants_are_compared_and_the_gate_fails(cli, compared):
    """So few examples decide nothing, which is not good enough for a strict gate."""
    command, out = compared
    code, printed, err = cli(*command)
    assert (code, printed) == (run.GATE_FAILED, ""), err
    report = json.loads((out / "report.json").read_text())
    assert list(report["tasks"]) == ["arc_easy", "lambada_openai", "wikitext"]
    for task, n in (("arc_easy", 13), ("lambada_openai", 11)):
        assert report["tasks"][task]["baseline"]["verdict"] is None
        for name in ("ring", "dropped"):
            told = report["tasks"][task][name]
            assert told["n"] == n and told["low"] <= told["difference"] <= told["high"] and told["verdict"]
            assert 0 <= told["accuracy"] <= 1 and 0 < told["p_mcnemar"] <= 1
    same = report["tasks"]["arc_easy"]["ring"]
    assert (same["lost"], same["won"], same["difference"]) == (0, 0, 0.0), "context parallelism changes no score"
    of_text = report["tasks"]["wikitext"]
    assert abs(of_text["ring"]["difference"]) < 1e-5 < abs(of_text["dropped"]["difference"])
    assert of_text["ring"]["accuracy"] is None and of_text["ring"]["perplexity"] > 1
    assert [one["dropped"] for one in report["variants"].values()] == [0.0, 0.0, 1.0]
    assert report["gate"] == {"variants": ["dropped"], "strict": True, "failed": ["dropped"], "passed": False}
    page = (out / "report.md").read_text()
    assert "FAILED by dropped" in page and "![accuracy](accuracy.svg)" in page
    assert all(f"| {task}" in page for task in report["tasks"])
    assert "<svg" in (out / "accuracy.svg").read_text() and (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    read = json.loads((out / "manifest.json").read_text())["data"]
    assert [Path(name).name for name in read] == ["arc_easy.jsonl", "lambada_openai.jsonl", "wiki.test.raw"]
    assert "gate failed: dropped" in err and len(list((out / "responses").iterdir())) == 3


def test_the_same_again_asks_nothing(cli, compared, monkeypatch):
    command, out = compared
    before = json.loads((out / "report.json").read_text())
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli(*command)[0] == run.GATE_FAILED
    after = json.loads((out / "report.json").read_text())
    assert {name: after[name] for name in ("tasks", "average", "variants")} == {
        name: before[name] for name in ("tasks", "average", "variants")
    }
    code, _, err = cli(*command, "eval.gate=[ring]", "eval.strict=false")
    assert code == 0, err


def test_answers_of_another_commit_are_named_in_the_report_too(cli, compared, monkeypatch):
    command, out = compared
    before = json.loads((out / "report.json").read_text())["commit"]
    assert "of another commit" not in cli(*command)[2]
    monkeypatch.setattr(run, "commit_of", lambda _: "000000000000")
    _, _, err = cli(*command)
    assert f"has answers of another commit, {before}: another out= asks all of them anew" in err
    assert json.loads((out / "report.json").read_text())["commit"] == f"000000000000, {before}"
    assert f"commit: 000000000000, {before}" in (out / "report.md").read_text()


def test_a_corrupt_answer_is_named_and_computed_again(cli, compared):
    command, out = compared
    job_before = json.loads((out / "report.json").read_text())
    file = next((out / "responses").iterdir())
    lines = file.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"answer": [' in line)
    lines[at] = lines[at].replace('"answer": [-', '"answer": [-9')
    file.write_text("\n".join(lines) + "\n")
    _, _, err = cli(*command)
    assert f"{file}, line {at + 1} is not as it was written: what was there is computed again" in err
    assert ": 1 of " in err
    assert "is not as it was written" not in cli(*command)[2], "the line is gone"
    job_after = json.loads((out / "report.json").read_text())
    assert job_after["average"] == job_before["average"]


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, recipe_cli.STOPPED)])
def test_a_run_that_was_ended_asks_only_what_is_missing(cli, tiny, sets, tmp_path, ending, code):
    """Killed, or asked to stop, once some answers are there; then the same outcomes as of one that was not."""
    words = [
        f"model={tiny}",
        "eval.tasks=[arc_easy,lambada_openai]",
        f"eval.data={sets}",
        "eval.max_batch_tokens=1",
        "run.threads=1",
    ]
    command = [sys.executable, "-m", "eval.run", *words, f"out={tmp_path / 'killed'}"]
    run_of = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    answers = tmp_path / "killed" / "responses"
    until = time.monotonic() + 300
    while not any(file.read_bytes().count(b"answer") > 3 for file in answers.glob("*")):
        assert time.monotonic() < until and run_of.poll() is None, "no answers came"
        time.sleep(0.01)
    while run_of.poll() is None:
        os.killpg(run_of.pid, ending)
        time.sleep(0.05)
    assert run_of.returncode == code
    (file,) = answers.iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:7])  # as if it had been no later, in the middle of a line
    went_on, _, err = cli(*words, f"out={tmp_path / 'killed'}")
    assert went_on == 0, err
    left, whole = map(int, re.search(r"(\d+) of (\d+) requests to answer", err).groups())
    assert left == whole - sum(b"answer" in line for line in lines[:3]) < whole
    assert cli(*words, f"out={tmp_path / 'whole'}")[0] == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["tasks"] == reports[1]["tasks"]


def test_long_texts_are_asked_on_every_mesh_and_with_blocks_dropped(cli, tiny, tmp_path):
    """Text that is decoded, right or wrong by what is in it: on a ring the same, to the letter."""
    variants = "variants=[{name:ring,mesh:{ring:2}},{name:dropped,mesh:{tp:3},spd:{drop:all}}]"
    # Of this seed four names are short enough for so few bytes.
    words = (
        "eval.tasks=[needle,multikey]",
        "eval.lengths=[397]",
        "eval.limit=2",
        "eval.seed=2",
        "run.threads=1",
        variants,
    )
    code, _, err = cli(f"model={tiny}", *words, f"out={tmp_path}")
    assert code == 0, err
    told = json.loads((tmp_path / "report.json").read_text())["tasks"]
    assert {name: {of: one["n"] for of, one in by.items()} for name, by in told.items()} == {
        name: {"baseline": 2, "ring": 2, "dropped": 2} for name in ("needle_397", "multikey_397")
    }
    kept = [responses.read(file).answers for file in (tmp_path / "responses").iterdir()]
    assert all(isinstance(text, str) and len(of) == 4 for of in kept for text in of.values())
    assert len({str(sorted(of.items())) for of in kept}) == 2, "of the ring the baseline's, of dropped blocks others"


def test_speed_is_told_beside_lm_evals_own_model(monkeypatch, capsys, tiny, sets, tmp_path):
    words = [f"model={tiny}", "eval.tasks=[arc_easy]", f"eval.data={sets}", "eval.limit=3", "run.threads=1"]
    monkeypatch.setattr("sys.argv", ["speed", *words, "speed.rounds=1", "speed.batches=[2]", f"out={tmp_path}"])
    try:
        recipe_cli.main("eval_speed", speed.task)
    finally:
        GlobalHydra.instance().clear()
    told = json.loads((tmp_path / "speed.json").read_text())["tasks"]["arc_easy"]
    assert told["examples"] == 3 and list(told["seconds"]) == ["ours", "hf, batch 2"]
    assert all(took > 0 for rounds in told["seconds"].values() for took in rounds)
    assert told["largest_difference"] < 1e-4
    assert "arc_easy" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(tiny: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory):
    """The job of those settings; composed once, since Hydra is slow."""
    out = tmp_path_factory.mktemp("out")
    words = ["model=folder", f"model.source={tiny}", "model.name=tiny", f"out={out}", f"eval.data={sets}"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(overrides.CONFIGS)):
        config = hydra.compose("evaluate", words)
    return lambda *settings: run.prepare(OmegaConf.merge(config, OmegaConf.from_dotlist(list(settings))))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["eval.tasks=[]"], "eval.tasks is empty"),
        (["eval.tasks=[piqa]"], "piqa.jsonl, which is not there"),
        (["eval.data=/no/such"], "eval.data=/no/such is no folder"),
        (["eval.limit=0"], "eval.limit=0"),
        (["eval.max_length=398"], "the model's context is 397"),
        (["eval.tasks=[needle]", "eval.lengths=[307]", "eval.max_length=306"], "the model's context is 306"),
        (["eval.limits={hellasawg: 3}"], "eval.limits: there is no task hellasawg among arc_easy"),
        (["eval.tasks=[needle]", "eval.lengths=[512]"], "eval.lengths=512: the model's context is 397"),
        (["eval.gate=[nobody]"], "there is no variant nobody: there are baseline"),
        (["mesh.dp=2"], "eval.run has no use for mesh.dp=2"),
        (["mesh.tp=2"], "use mesh.tp=1"),
        (["context.chunk=5"], "context.chunk=5"),
        (["context.strategy=auto"], "context.strategy=auto"),
        (["variants=[{mesh: {ring: 2}}]"], "has no name"),
        (["variants=[{name: a}, {name: a}]"], "variants: a is there twice"),
        (["variants=[{name: a, eval: {limit: 3}}]"], "variants: a: eval is not one of model, mesh, context, spd"),
        (["variants=[{name: a, mesh: {tp: 2}}]"], "use mesh.tp=1"),
        (["variants=[{name: a, spd: {drop: all}}]"], "one tensor-parallel rank has no reduction to drop"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_before_any_rank_starts(prepared, monkeypatch, settings, words):
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ValueError, match=r"\w") as refused:
        prepared(*settings)
    assert words in str(refused.value)


def test_a_variant_of_another_model_is_refused(prepared, tmp_path):
    other = tiny_model(tmp_path / "other", max_positions=397, heads=6)
    with pytest.raises(ValueError, match=r"variant a: .*other has 24 for hidden, the baseline 36"):
        prepared(f"variants=[{{name: a, model: {other}}}]")


def test_a_model_that_was_repaired_for_another_is_refused(prepared, tiny, tmp_path):
    import shutil

    from longctx.spd.plan import SavedPlan, SPDPlan

    shutil.copytree(tiny, tmp_path / "adapted")
    SavedPlan(SPDPlan(2, 3, (0,)), (0, 1), (0,), "of another").write(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"variant a repaired: .*adapted was made from another model than tiny"):
        prepared(
            f"adapted={tmp_path / 'adapted'}", "mesh.tp=3", "spd.drop=none", "variants=[{name: a, spd: {drop: all}}]"
        )


def test_the_shipped_experiment_is_one(data, smollm2, tmp_path):
    words = ["experiment=evaluate/spd_regression", "eval.limit=1", f"eval.data={data}", f"out={tmp_path}"]
    job = run.prepare(recipe_cli.composed("evaluate", words))
    assert len(job.tasks) >= 6 and [variant.name for variant in job.variants][1:] == [
        f"dropped {share}%" for share in (25, 50, 75, 100)
    ]


def test_limits_are_of_each_task(prepared):
    tasks = "eval.tasks=[arc_easy,lambada_openai,wikitext,needle]"
    job = prepared(tasks, "eval.limit=5", "eval.limits={wikitext: 1, needle: 2}", "eval.lengths=[307]")
    assert {name: len({i.doc_id for i in task.instances}) for name, task in job.tasks.items()} == {
        "arc_easy": 5,
        "lambada_openai": 5,
        "wikitext": 1,
        "needle_307": 2,
    }
    assert len(job.requests) == 5 * 4 + 5 + 1 + 2


def test_a_limit_of_a_group_is_refused(prepared):
    """Its tasks have other names: it would limit nothing."""
    asked = replace(prepared("eval.limit=1").eval, tasks=("blimp",), limits={"blimp": 5})
    with pytest.raises(ValueError, match=r"eval.limits.blimp is of a group of tasks: use eval.limit"):
        asked.refuse_unknown_limits(["blimp_adjunct_island", "blimp_passive_1"])


def test_answers_depend_on_what_ends_them(prepared, tiny, tmp_path):
    base = prepared("eval.limit=1").variants[0]
    other = shutil.copytree(tiny, tmp_path / "other")
    assert replace(base, folder=other).digest == base.digest
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert replace(base, folder=other, shape=shape_of(other)).digest != base.digest
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert replace(base, folder=other).digest != base.digest


def test_a_log_probability_that_is_no_number_is_refused(prepared, tmp_path):
    work = EvalWork("a", prepared("eval.limit=1").variants[0], (), tmp_path, 1, 1, 1)
    _refuse_no_numbers(work, [-1.5, -math.inf])
    with pytest.raises(ValueError, match=r"variant baseline: 1 of 2 log-probabilities are not a number"):
        _refuse_no_numbers(work, [-1.5, math.nan])


def test_a_variant_whose_context_is_too_short_is_refused(prepared, tmp_path):
    words = (
        f"model.cache={tmp_path}",
        "model.rope_factor=2",
        "eval.tasks=[needle]",
        "eval.lengths=[701]",
        "eval.limit=1",
    )
    plain = "variants=[{name: plain, model: {rope_factor: null}}]"
    with pytest.raises(ValueError, match=r"variant plain: its context is 397, .* up to [4-7]\d\d tokens"):
        prepared(*words, plain)
    assert (
        prepared(*words, "variants=[{name: theta, model: {rope_theta: 7e4}}]").variants[1].target.shape.max_positions
        == 794
    )


def test_an_order_that_is_measured_on_the_baseline_is_for_no_other_model(prepared, tmp_path):
    words = (f"model.cache={tmp_path}", "mesh.tp=3", "spd.drop=none")
    with pytest.raises(ValueError, match=r"variant a: the order .* is measured on the baseline, and this is another"):
        prepared(*words, "variants=[{name: a, model: {rope_factor: 2}, spd: {drop: ranked, budget: 0.5}}]")


def test_a_variant_that_is_a_folder_has_its_own_context(prepared, tiny, tmp_path):
    words = (f"model.cache={tmp_path}", "model.rope_theta=70000", f"variants=[{{name: plain, model: {tiny}}}]")
    base, other = prepared(*words).variants
    assert other.target.folder == tiny and base.target.shape.rotary != other.target.shape.rotary


def test_a_variant_may_have_another_context(prepared, tmp_path):
    job = prepared(f"model.cache={tmp_path}", "variants=[{name: interpolated, model: {rope_factor: 2}}]")
    base, changed = job.variants
    assert (base.target.shape.max_positions, changed.target.shape.max_positions) == (397, 794)
    assert changed.digest != base.digest, "answers of one are not the other's"
