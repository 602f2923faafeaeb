"""recipes.reproduce compares all that a run wrote, and writes over none of it."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from recipes import compare, reproduce
from recipes.common import cli as recipe_cli
from recipes.common.manifest import flat

TURN = {"answer": "So.", "strategy": "pass_q", "why": "auto: 3 ms", "ttft_s": 0.3, "ttit_s": 0.1, "token_ids": [5, 7]}


@pytest.fixture
def ran(tmp_path):
    """``ran(name, out, **files)``: the folder of a run that wrote ``files``; its ``session`` is a setting."""

    def ran(name, out="", session=None, module="recipes.chat", **files):
        folder = tmp_path / name
        folder.mkdir()
        asked = ("processor", "cores", "python", "torch", "commit", "diff")
        told = {**dict.fromkeys(asked, ""), "data": {}, "packages": {}, "hardware": {}, "overrides": []}
        place = {"out": str(folder / out), "folder": str(tmp_path), "config": {"session": session}}
        (folder / "manifest.json").write_text(json.dumps({**told, **place, "module": module}))
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return str(folder)

    return ran


@pytest.fixture
def same(monkeypatch, capsys):
    """``same(was, now)``: whether run ``now`` is said to give what ``was`` gave, and what is said."""

    def same(was, now):
        monkeypatch.setattr(reproduce, "again", lambda _: now)
        return reproduce._reproduced(was), capsys.readouterr().err

    return same


def test_names_go_on_inside_of_lists():
    nested = {"turns": [{"text": "a", "token_ids": [5, 7]}, {"text": "b"}], "none": [], "mixed": [{"a": 1}, 2]}
    inside = {"turns.0.text": "a", "turns.0.token_ids": [5, 7], "turns.1.text": "b"}
    assert flat(nested) == {**inside, "none": [], "mixed": [{"a": 1}, 2]}


def test_a_conversation_is_compared_turn_by_turn_without_its_seconds(ran, same, capsys):
    def talk(name, *turns):
        return ran(name, "turns.json", turns_json=json.dumps({"model": "tiny", "turns": turns}))

    slower = {**TURN, "why": "auto: 4 ms", "ttft_s": 0.4, "ttit_s": 0.2}
    was, now = talk("was", TURN, TURN), talk("now", TURN, slower)
    agrees, says = same(was, now)
    assert agrees and "7 of 7 final figures are the same" in says and re.search(r"turns\.1\.answer\s+So\.\s+So\.", says)
    agrees, says = same(was, talk("other", TURN, {**TURN, "token_ids": [5, 8]}))
    assert not agrees and re.search(r"turns\.1\.token_ids\s+\[5, 7\]\s+\[5, 8\]", says)
    agrees, says = same(was, talk("longer", TURN, TURN, TURN))
    assert not agrees and "turns.2.answer" in says, "what was not there before is no less of a difference"
    compare.compare([was, now])
    assert re.search(r"turns\.1\.ttft_s\s+0\.3\s+0\.4", capsys.readouterr().out)


@pytest.mark.parametrize("load", [None, "other"])
def test_a_conversation_is_saved_beside_the_one_that_is_there(ran, monkeypatch, load):
    given = []
    done = CompletedProcess((), 0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: given.append(words) or done)
    beside = ran("talked", "turns.json", {"save": "talk", "load": load}) + "-again"
    assert reproduce.run_again(beside.removesuffix("-again")) == f"{beside}/turns.json"
    assert given[0][-2:] == [f"out={beside}/turns.json", f"session.save={beside}/session"]


def test_a_session_that_was_written_over_is_not_gone_on_from(ran, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    session = {"save": "talk", "load": str(Path(tmp_path, "x", "..", "talk"))}
    folder = ran("talked", "turns.json", session, turns_json=json.dumps({"turns": [TURN]}))
    with pytest.raises(SystemExit) as leaving:
        recipe_cli.reporting(lambda: reproduce.reproduce([folder]))
    assert leaving.value.code == 2 and "saved its session over the one that it went on from" in capsys.readouterr().err


def lines(*steps):
    return "".join(json.dumps({"step": step, **figures}) + "\n" for step, figures in enumerate(steps))


def test_of_an_evaluation_its_report_is_compared(ran, same):
    """What its record of steps has is averages of accuracy, and nothing at all of perplexity."""

    def evaluated(name, perplexity, seconds):
        report = {"tasks": {"text": {"baseline": {"perplexity": perplexity, "accuracy": None}}}}
        speed = {"variants": {"baseline": {"tokens_per_s": seconds}}}
        return ran(name, module="eval.run", report_json=json.dumps(report | speed), metrics_jsonl=lines({}))

    was = evaluated("was", 31.5, 7.0)
    agrees, says = same(was, evaluated("now", 31.5, 9.0))
    assert agrees and "1 of 1 final figures" in says and "tasks.text.baseline.perplexity" in says
    agrees, says = same(was, evaluated("other", 31.6, 7.0))
    assert not agrees and re.search(r"tasks\.text\.baseline\.perplexity\s+31\.5\s+31\.6", says)


@pytest.mark.parametrize(("module", "same_end"), [("recipes.spd_adapt", False), ("recipes.pretrain", True)])
def test_of_blocks_every_line_is_compared_and_of_training_the_last(ran, same, module, same_end):
    first, last = {"spd/error_fitted": 0.5}, {"spd/error_fitted": 0.25, "spd/divergence_after": 0.125}
    was = ran("was", module=module, metrics_jsonl=lines(first, last))
    now = ran("now", module=module, metrics_jsonl=lines({"spd/error_fitted": 0.75}, last))
    agrees, says = same(was, now)
    assert agrees == same_end and ("0.spd/error_fitted" in says) != same_end


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no figures yet: report.json and metrics.jsonl in"),
        ({"metrics_jsonl": lines({})}, "metrics.jsonl has step; give a run that has come to its end"),
        ({"metrics_jsonl": lines({"loss": None, "step_s": 3.0})}, "metrics.jsonl has step, step_s; give a run"),
    ],
    ids=["none", "a step", "seconds"],
)
def test_a_run_without_figures_is_not_run_again(ran, monkeypatch, files, words):
    monkeypatch.setattr(reproduce, "again", lambda _: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"has no figures") as refusal:
        reproduce.reproduce([ran("was", module="recipes.pretrain", **files)])
    assert words in str(refusal.value)
