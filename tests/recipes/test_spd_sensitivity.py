"""recipes.spd_sensitivity on a tiny model: results, picture, resumption."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from recipes import spd_sensitivity
from recipes.spd_sensitivity import SensitivityThresholds

TEXT = ("data.length=31", "data.end_token=false", "sequences=5", "chunk=2", "run.threads=1")


def test_sensitivity_writes_json_and_picture_and_resumes(cli, tiny, tmp_path):
    command = (f"model={tiny}", "mesh.tp=3", f"out={tmp_path}", *TEXT)
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command)
    assert code == 0, err
    result = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [block["block"] for block in result["blocks"]] == [0, 1] and sorted(result["order"]) == [0, 1]
    assert result["blocks"][0]["perplexity"] - result["blocks"][1]["perplexity"] == pytest.approx(
        result["blocks"][0]["score"]
    )
    assert result["blocks"][1]["perplexity"] - result["perplexity"] == pytest.approx(result["blocks"][1]["score"])
    assert "<svg" in (tmp_path / "sensitivity.svg").read_text()
    assert result["command"].startswith("python -m recipes.spd_sensitivity model=")
    # Interrupted while it writes the second of three chunks; two data-parallel ranks resume it to the same result.
    sums = (tmp_path / "sums.jsonl").read_text().splitlines(keepends=True)
    assert len(sums) == 4
    (tmp_path / "sums.jsonl").write_text("".join(sums[:2]) + sums[2][:7])
    (tmp_path / "sensitivity.json").unlink()
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command, "mesh.dp=2")
    assert code == 0, err
    again = json.loads((tmp_path / "sensitivity.json").read_text())
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command)
    assert code == 0, "the half-written line is gone"
    assert [b["score"] for b in again["blocks"]] == pytest.approx([b["score"] for b in result["blocks"]], abs=1e-9)


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"classes.tau1=3.0, .* is above classes.tau2=2.0"):
        SensitivityThresholds(3.0, 2.0)


def test_loss_that_is_not_finite_is_refused(cli, tiny, tmp_path):
    """Finite weights whose products overflow: a score of NaN would be a class like any other."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: 1e30 * x for name, x in tensors.items() if "layers.1.mlp" in name}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    words = ("mesh.tp=3", *TEXT)
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, f"model={model}", *words, f"out={tmp_path}/out")
    assert code == 1
    assert "the loss of the text is nan with the reductions of blocks none dropped" in err.splitlines()[-1]
    assert len((tmp_path / "out" / "sums.jsonl").read_text().splitlines()) == 1, "no sum was written"
