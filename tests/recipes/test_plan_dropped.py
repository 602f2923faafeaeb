"""Plans with dropped reductions: never more blocks than are allowed, and never slower for the permission."""

import json
from dataclasses import replace

import pytest

from longctx.config import Mesh
from recipes import plan
from recipes.common.hardware_file import read_machine
from recipes.common.plan_question import Question, WorkSettings
from recipes.common.planning import plans_of
from recipes.common.spd_report import AllowedDrop, read_allowed_drop
from tests.cost.predict import ROOT, shape_named


def test_whole_blocks_drop_and_never_more_than_are_allowed():
    question = Question(shape_named("llama3_8b"), read_machine("a100_lbw"), 8, WorkSettings("prefill"))
    for share, blocks in ((0.01, 0), (0.02, 0), (1 / 32, 1), (0.06, 1), (0.25, 8), (0.99, 31), (1.0, 32)):
        allowed = replace(question, allowed_drop=AllowedDrop(share))
        assert allowed.numbers(Mesh(tp=8)).spd_share == blocks / 32
    tenths = replace(question, shape=question.shape.first(30), allowed_drop=AllowedDrop(23 / 30))
    assert tenths.numbers(Mesh(tp=8)).spd_share == 23 / 30


def test_dropped_reductions_are_not_planned_with_shared_weights():
    question = Question(
        shape_named("llama3_405b"),
        read_machine("h100_gtt"),
        16,
        WorkSettings("decode", 131072),
        allowed_drop=AllowedDrop(0.5),
        max_memory_gb=500,
    )
    for one in plans_of(question):
        if one.decode == "sharded" and one.mesh.tp > 1 and one.mesh.context > 1:
            assert one.question.numbers(one.mesh).spd_share == 0, "these layers drop no reduction"
    assert any(one.decode == "sharded" and one.refused is None for one in plans_of(question))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_permission_to_drop_never_makes_the_best_plan_slower(kind):
    question = Question(shape_named("llama3_70b"), read_machine("h200"), 8, WorkSettings(kind))
    best = []
    for share in (0.0, 0.02, 0.1, 0.5, 1.0):
        plans = plans_of(replace(question, allowed_drop=AllowedDrop(share)))
        best.append(next(one.seconds for one in plans if one.refused is None))
    assert best == sorted(best, reverse=True) and best[-1] < best[0]


REPORT = ROOT / "docs" / "results" / "spd" / "regression.json"


def test_a_report_decides_which_share_of_blocks_may_drop(cli, tmp_path):
    """The largest share that is no worse counts, on the tensor-parallel degree that was measured."""
    text = REPORT.read_text().replace("smollm2_135m", "llama3_8b").replace("tp=3", "tp=4")
    report, file = json.loads(text), tmp_path / "report.json"
    for one in report["average"].values():
        one["verdict"] = "undecided"
    file.write_text(json.dumps(report))
    undecided = read_allowed_drop(str(file), "llama3_8b")
    assert undecided.share == 0 and "no variant with dropped reductions is no worse" in undecided.why
    for name in ("dropped 25% repaired", "dropped 50% repaired"):
        report["average"][name]["verdict"] = "no worse"
    file.write_text(json.dumps(report))
    words = ("model=llama3_8b", "hardware=a100_lbw", "gpus=8", f"allowed_drop={file}", f"out={tmp_path}/plans.json")
    code, out, err = cli(plan, plan.task, *words)
    assert code == 0, err
    shown = "up to 50% of the blocks of the repaired model hg1024 may drop at mesh.tp=4 (dropped 50% repaired)"
    assert shown in " ".join((out + err).split())
    assert read_allowed_drop(str(file), "llama3_8b").settings == (
        "model=FOLDER spd=saved spd.budget=0.5, with the folder of hg1024"
    )
    for one in report["variants"].values():
        one["repaired"] = False
    file.write_text(json.dumps(report))
    assert read_allowed_drop(str(file), "llama3_8b").settings == "spd=ranked spd.budget=0.5 spd.sensitivity=FILE"
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert {one["mesh"]["tp"]: one["dropped"] for one in plans} == {1: 0.0, 2: 0.0, 4: 0.5, 8: 0.0}
    with pytest.raises(ValueError, match="a report on llama3_8b, not on tiny"):
        read_allowed_drop(str(file), "tiny")
    for one in report["variants"].values():
        one["mesh"] = "ring=2"
    file.write_text(json.dumps(report))
    assert "no worse (none drops at mesh.tp above 1)" in read_allowed_drop(str(file), "llama3_8b").why
    report["variants"]["baseline"]["dropped"] = 0.75
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="baseline drops or rounds reductions itself"):
        read_allowed_drop(str(file), "llama3_8b")
