"""A failed guard is refused or named, and guards.json has every figure."""

import json
from types import SimpleNamespace

import pytest

from longctx.config import Repair
from longctx.spd.plan import FILE as PLAN
from recipes.common.spd_guards import judge_guards
from tests.spd.test_guards import figures


@pytest.mark.parametrize(("guard", "copied", "code"), [("refuse", 0.5, 3), ("warn", 0.5, 0), ("refuse", 0.8, 0)])
def test_failed_guard_is_refused_or_named(guard, copied, code, tmp_path, capsys):
    job = SimpleNamespace(out=tmp_path, budget=0.5, repair=Repair(guard=guard))
    models = [figures(), figures(copied=0.1), figures(copied=copied)]
    if code:
        with pytest.raises(SystemExit) as refused:
            judge_guards(job, models)
        assert refused.value.code == code
    else:
        judge_guards(job, models)
    said, written = capsys.readouterr().err, json.loads((tmp_path / "guards.json").read_text())
    fails = "share of random tokens copied 0.9 -> 0.5"
    assert (fails in said) == (copied == 0.5) == bool(written["failed"])
    assert (written["written"], written["budget"]) == (code == 0, 0.5)
    assert ("guard failed" in said, "warning: " in said) == (code == 3, guard == "warn")
    (copying,) = (one for one in written["guards"] if one["name"] == "share of random tokens copied")
    assert (copying["original"], copying["dropped"], copying["repaired"]) == (0.9, 0.1, copied)


def test_failed_guard_says_that_an_earlier_model_stays(tmp_path, capsys):
    (tmp_path / PLAN).touch()
    job = SimpleNamespace(out=tmp_path, budget=0.5, repair=Repair())
    with pytest.raises(SystemExit):
        judge_guards(job, [figures(), figures(), figures(copied=0.1)])
    assert f"{tmp_path} still has the model of an earlier run" in " ".join(capsys.readouterr().err.split())


def test_no_guards_are_no_file(tmp_path):
    (tmp_path / "guards.json").write_text("of an earlier model")
    judge_guards(SimpleNamespace(out=tmp_path, repair=Repair(guard="off")), [])
    assert not list(tmp_path.iterdir())
