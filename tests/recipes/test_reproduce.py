"""recipes.reproduce compares all figures of a run with its repetition, and overwrites nothing."""

import json
import re
import subprocess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from recipes import chat, compare, reproduce
from recipes.common import cli as recipe_cli
from recipes.common.manifest import flat
from tests.recipes.chats import converse

TURN = {"answer": "So.", "strategy": "pass_q", "why": "auto: 3 ms", "ttft_s": 0.3, "ttit_s": 0.1, "token_ids": [5, 7]}


@pytest.fixture
def write_run(tmp_path):
    """``write_run(name, out, **files)``: the folder of a run that wrote ``files`` (``report_json`` is report.json)."""

    def write_run(name, out="", session=None, module="recipes.chat", turns="turns.jsonl", **files):
        folder = tmp_path / name
        folder.mkdir()
        empty = dict.fromkeys(("processor", "cores", "python", "torch", "commit", "diff"), "")
        inputs = {"data": {}, "packages": {}, "hardware": {}, "overrides": []}
        place = {"out": str(folder / out), "folder": str(tmp_path), "config": {"session": session, "turns": turns}}
        (folder / "manifest.json").write_text(json.dumps({**empty, **inputs, **place, "module": module}))
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return str(folder)

    return write_run


@pytest.fixture
def same(monkeypatch, capsys):
    """``same(was, now)``: True if the repetition ``now`` agrees with the run ``was``, and what is printed."""

    def same(was, now):
        monkeypatch.setattr(reproduce, "run_again", lambda _: now)
        return reproduce._reproduce(was), capsys.readouterr().err

    return same


@pytest.mark.parametrize(
    ("decode", "figures", "words"),
    [
        ("auto", {"decode_choices": {"1": ["sharded", "auto: 3 ms"]}, "decode_strategy": "auto"}, ["sharded"]),
        ("auto", {"turns": [{**TURN, "decode_strategy": "gather_merge"}] * 2}, ["gather_merge"]),
        ("auto", {"decode_choices": {"1": ["sharded", ""], "2": ["gather_merge", ""]}, "text": "a"}, []),
        ("auto", {"text": "a"}, []),
        ("pass_q", {"text": "a"}, ["pass_q"]),
    ],
)
def test_repetition_decodes_as_the_run_did(write_run, decode, figures, words):
    run = write_run("was", "answer.json", answer_json=json.dumps({"tokens": 3, **figures}))
    manifest = {"config": {"context": {"decode": decode}}}
    assert reproduce._decoded(run, manifest) == [f"context.decode={word}" for word in words]
    assert reproduce._decoded(run, {"config": {}}) == []


def test_items_of_lists_are_named_by_number():
    nested = {"turns": [{"text": "a", "token_ids": [5, 7]}, {"text": "b"}], "none": [], "mixed": [{"a": 1}, 2]}
    by_number = {"turns.0.text": "a", "turns.0.token_ids": [5, 7], "turns.1.text": "b"}
    assert flat(nested) == {**by_number, "none": [], "mixed": [{"a": 1}, 2]}


def test_conversation_is_compared_turn_by_turn_without_seconds(write_run, same, capsys):
    def talk(name, *turns):
        return write_run(name, "turns.json", turns_json=json.dumps({"model": "tiny", "turns": turns}))

    slower = {**TURN, "why": "auto: 4 ms", "ttft_s": 0.4, "ttit_s": 0.2}
    was, now = talk("was", TURN, TURN), talk("now", TURN, slower)
    agrees, printed = same(was, now)
    assert (
        agrees
        and "7 of 7 final figures are the same" in printed
        and re.search(r"turns\.1\.answer\s+So\.\s+So\.", printed)
    )
    agrees, printed = same(was, talk("other", TURN, {**TURN, "token_ids": [5, 8]}))
    assert not agrees and re.search(r"turns\.1\.token_ids\s+\[5, 7\]\s+\[5, 8\]", printed)
    agrees, printed = same(was, talk("longer", TURN, TURN, TURN))
    assert not agrees and "turns.2.answer" in printed, "a new figure is a difference"
    compare.compare([was, now])
    assert re.search(r"turns\.1\.ttft_s\s+0\.3\s+0\.4", capsys.readouterr().out)


@pytest.mark.parametrize("load", [None, "other"])
def test_conversation_is_saved_beside_the_existing_session(write_run, monkeypatch, load):
    commands = []
    success = CompletedProcess((), 0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: commands.append(words) or success)
    beside = write_run("talked", "turns.json", {"save": "talk", "load": load}) + "-again"
    assert reproduce.run_again(beside.removesuffix("-again")) == f"{beside}/turns.json"
    assert commands[0][-2:] == [f"out={beside}/turns.json", f"session.save={beside}/session"]


def test_run_given_by_its_file_writes_beside_it(write_run, monkeypatch):
    commands = []
    success = CompletedProcess((), 0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: commands.append(words) or success)
    folder = write_run("talked", "turns.v1.json", {"save": "talk", "load": None})
    for name in ("turns.v1-again", "turns.v1-again-2"):
        assert reproduce.run_again(f"{folder}/turns.v1.json") == f"{folder}/{name}.json"
        assert commands[-1][-2:] == [f"out={folder}/{name}.json", f"session.save={folder}/{name}-session"]
        Path(folder, f"{name}.json").touch()


def test_run_that_overwrote_the_session_it_resumed_is_refused(write_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    session = {"save": "talk", "load": str(Path(tmp_path, "x", "..", "talk"))}
    folder = write_run("talked", "turns.json", session, turns_json=json.dumps({"turns": [TURN]}))
    with pytest.raises(SystemExit) as exited:
        recipe_cli.exit_on_error(lambda: reproduce.reproduce([folder]))
    assert exited.value.code == 2 and "saved its session over the one that it resumed" in capsys.readouterr().err


def lines(*steps):
    """Return the figures of ``steps`` as JSON lines, numbered from 0."""
    return "".join(json.dumps({"step": step, **figures}) + "\n" for step, figures in enumerate(steps))


def test_report_of_an_evaluation_is_compared(write_run, same):
    """Its metrics.jsonl has averages of accuracy only, and no perplexity."""

    def write_evaluation(name, perplexity, seconds):
        report = {"tasks": {"text": {"baseline": {"perplexity": perplexity, "accuracy": None}}}}
        speed = {"variants": {"baseline": {"tokens_per_s": seconds}}}
        return write_run(name, module="eval.run", report_json=json.dumps(report | speed), metrics_jsonl=lines({}))

    was = write_evaluation("was", 31.5, 7.0)
    agrees, printed = same(was, write_evaluation("now", 31.5, 9.0))
    assert agrees and "1 of 1 final figures" in printed and "tasks.text.baseline.perplexity" in printed
    agrees, printed = same(was, write_evaluation("other", 31.6, 7.0))
    assert not agrees and re.search(r"tasks\.text\.baseline\.perplexity\s+31\.5\s+31\.6", printed)


@pytest.mark.parametrize(("module", "same_end"), [("recipes.spd_adapt", False), ("recipes.pretrain", True)])
def test_last_line_of_training_and_every_line_of_adaptation_are_compared(write_run, same, module, same_end):
    first, last = {"spd/error_fitted": 0.5}, {"spd/error_fitted": 0.25, "spd/divergence_after": 0.125}
    was = write_run("was", module=module, metrics_jsonl=lines(first, last))
    now = write_run("now", module=module, metrics_jsonl=lines({"spd/error_fitted": 0.75}, last))
    agrees, printed = same(was, now)
    assert agrees == same_end and ("0.spd/error_fitted" in printed) != same_end


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no figures yet: report.json and metrics.jsonl in"),
        ({"metrics_jsonl": lines({})}, "metrics.jsonl has step; give a run that has ended"),
        ({"metrics_jsonl": lines({"loss": None, "step_s": 3.0})}, "metrics.jsonl has step, step_s; give a run"),
    ],
    ids=["none", "a step", "seconds"],
)
def test_run_without_figures_is_not_run_again(write_run, monkeypatch, files, words):
    monkeypatch.setattr(reproduce, "run_again", lambda _: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"has no figures") as refusal:
        reproduce.reproduce([write_run("was", module="recipes.pretrain", **files)])
    assert words in str(refusal.value)


def test_conversation_whose_turns_were_typed_is_not_run_again(write_run, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    folder = write_run("was", "turns.json", turns=None, turns_json=json.dumps({"turns": [TURN]}))
    with pytest.raises(ValueError, match=r"typed or piped in, .* turns=FILE\.jsonl"):
        reproduce.reproduce([folder])


def test_copy_of_the_source_that_python_cannot_find_is_refused(tmp_path, write_run):
    """Other code would run, and its figures be called the same."""
    run = Path(write_run("a:b"))
    (run / "code" / "recipes").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"would run other code than that in \S+/a:b/code: rename the folder"):
        reproduce.run_again(str(run))


def test_conversation_with_the_default_settings_is_reproduced(cli, tiny, turns, tmp_path, monkeypatch, capsys):
    """The second run, in this process here, decodes by the way that ``context.decode=auto`` chose in the first."""

    def run_here(command, *, stdin, **_):
        assert stdin == subprocess.DEVNULL
        return SimpleNamespace(returncode=cli(chat, chat.task, *command[3:])[0])

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run_here, DEVNULL=subprocess.DEVNULL))
    converse(cli, tiny, tmp_path, f"turns={turns}")
    reproduce.reproduce([str(tmp_path / "out.json")])
    assert "context.decode" in (err := capsys.readouterr().err) and "figures that differ" not in err
