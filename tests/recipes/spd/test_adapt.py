"""recipes.spd_adapt on a tiny model: files, figures, guards, settings."""

import json
import shutil

import pytest
from safetensors import safe_open

from longctx.spd import guards
from longctx.spd.plan import saved_plan
from recipes import generate, spd_adapt
from recipes.common import cli as recipe_cli
from tests.recipes.spd.conftest import PROMPT, REPAIR, TEXT, tensors
from tests.tracking import history, of_kind, records


def test_saved_order_drops_the_block_of_least_divergence_first(adapted_folder):
    lines = [json.loads(line) for line in (adapted_folder / "metrics.jsonl").read_text().splitlines()]
    alone = [line["spd/divergence_alone"] for line in lines[:2]]
    assert min(alone) > 0 and saved_plan(adapted_folder).order == tuple(sorted((0, 1), key=lambda block: alone[block]))


def test_record_has_a_line_per_block_and_joint_step(adapted_folder):
    lines = [json.loads(line) for line in (adapted_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[:2]:
        assert {"spd/sensitivity", "spd/error_distilled", "spd/joint_divergence"} <= set(line)
    assert lines[2]["spd/joint_divergence"] > 0 and lines[2]["spd/divergence_before"] > 0
    # The result of joint distillation is used only if it is better.
    helped = lines[2]["spd/divergence_after"] < lines[2]["spd/divergence_before"]
    used = tensors(adapted_folder, "joint_1/000.safetensors" if helped else "blocks/000.safetensors")
    assert {name: tensors(adapted_folder)[f"dropped.{name}"] for name in used} == used


def test_failed_guard_refuses_the_model(cli, tiny, adapted_folder, tmp_path, monkeypatch):
    """All steps are done, and their files are there: only a limit differs."""
    report = json.loads((adapted_folder / "guards.json").read_text())
    assert report["failed"] == [] and len(report["guards"]) == 6
    shutil.copytree(adapted_folder / "blocks", tmp_path / "blocks")
    shutil.copytree(adapted_folder / "joint_1", tmp_path / "joint_1")
    shutil.copy(adapted_folder / "sensitivity.json", tmp_path)
    monkeypatch.setattr(guards, "_INCREASE", -2.0)
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={tmp_path}", *TEXT, *REPAIR)
    code, _, err = cli(spd_adapt, spd_adapt.task, *words)
    assert code == recipe_cli.GATE_FAILED and not (tmp_path / "config.json").exists(), err
    assert "guard failed: perplexity of the first 8 tokens" in err and "repair.guard=warn writes this model" in err
    refused = json.loads((tmp_path / "guards.json").read_text())
    assert refused["failed"][0] == "perplexity of the first 8 tokens" and refused["guards"] != report["guards"]


def test_joint_distillation_that_makes_predictions_worse_is_discarded(cli, tiny, adapted_folder, tmp_path):
    shutil.copytree(adapted_folder / "blocks", tmp_path / "blocks")
    shutil.copy(adapted_folder / "sensitivity.json", tmp_path)
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={tmp_path}", *TEXT, *REPAIR, "joint.lr=1")
    code, _, err = cli(spd_adapt, spd_adapt.task, *words)
    assert code == 0 and "joint distillation was discarded" in err, err
    saved = tensors(tmp_path)
    for name, tensor in tensors(adapted_folder, "blocks/000.safetensors").items():
        assert saved[f"dropped.{name}"] == tensor


def test_wandb_run_has_settings_figures_and_a_reference_to_the_model(adapted_folder):
    read = records(next((adapted_folder / "wandb").glob("offline-run-*")))
    (run, *_) = of_kind("run", read)
    config = run["config"]["update"]
    assert run["job_type"] == "spd" and config["machine"]["host"] and config["mesh"]["tp"] == 3
    assert {row["_step"] for row in history(read)} == {0, 1, 2}
    (artifact,) = [record["artifact"] for record in read if record["type"] == "artifact"]
    refers_to = {content["ref"] for content in artifact["manifest"]["contents"]}
    assert artifact["name"] == f"spd-{adapted_folder.name}" and (adapted_folder / "spd_plan.json").as_uri() in refers_to


def test_distillation_reduces_the_error_of_every_block(adapted_folder):
    for block in (0, 1):
        with safe_open(adapted_folder / "blocks" / f"{block:03d}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert 0 < float(metadata["distilled"]) < float(metadata["zero_shot"])


@pytest.mark.parametrize(
    "more",
    [["repair.inputs=student"], ["repair.own_norms=true", "repair.weights=beginnings"], ["repair.grouping=shards"]],
)
def test_other_repair_settings_give_a_model_that_runs(cli, tiny, adapted_folder, tmp_path, more):
    sensitivity = f"spd.sensitivity={adapted_folder}/sensitivity.json"
    command = (f"model={tiny}", "mesh.tp=3", "spd.budget=0.5", sensitivity, f"out={tmp_path}", *TEXT, *REPAIR, *more)
    code, _, err = cli(spd_adapt, spd_adapt.task, *command)
    assert code == 0, err
    assert len(saved_plan(tmp_path).adapted) == 1
    for share in ("0.5", "1"):  # a block that was not repaired may drop as well
        code, _, err = cli(generate, generate.task, f"model={tmp_path}", "mesh.tp=3", f"spd.budget={share}", *PROMPT)
        assert code == 0, err
