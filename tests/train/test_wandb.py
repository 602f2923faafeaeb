"""Runs in W&B, read back from its offline files with its own reader."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracking import CONFIG, WANDB, figures, history, lines, of_kind, records, start

pytestmark = pytest.mark.usefixtures("wandb_at_home")


def test_wandb_is_imported_only_on_demand():
    program = "import sys, longctx.train.track; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, wandb_at_home):
    """A run of steps 0 to 4, resumed from step 3: its folder, id, messages, and the W&B records of both starts."""
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("run")
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "weights.bin").write_bytes(bytes(1013))
    imsave(folder / "picture.png", [[0.0, 1.0], [1.0, 0.0]])
    (folder / "manifest.json").write_text('{"module": "recipes.first"}')
    tracker, run_id, messages = start(folder, WANDB)
    for step in range(5):
        tracker.log(figures(step), step)
    tracker.table("eval/answers", ["question", "right"], [["a, b?", 1], ["c", 0]], 4)
    tracker.image("eval/picture", folder / "picture.png", 4)
    tracker.artifact(f"checkpoint-{run_id}", "checkpoint", checkpoint)
    tracker.finish()
    (folder / "manifest.json").write_text('{"module": "recipes.second"}')
    resumed, same_id, more = start(folder, WANDB, step=3, run_id=run_id)
    for step in range(3, 7):
        resumed.log(figures(step), step)
    resumed.finish()
    assert same_id == run_id
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    return folder, run_id, messages + more, [records(run) for run in runs]


def test_wandb_records_the_run_and_its_configuration(tracked):
    folder, run_id, messages, (first, _) = tracked
    run, *_ = of_kind("run", first)
    config = run.pop("config")["update"]
    assert {name: config[name] for name in CONFIG} == CONFIG
    expected = {"project": "long", "run_group": "sweep", "display_name": "first", "notes": "a, (note)"}
    expected |= {"run_id": run_id, "job_type": "train", "tags": ["cp", "8k"]}
    assert {name: run[name] for name in expected} == expected
    assert messages == [f"W&B run {run_id}: offline, in {folder}/wandb"] * 2


def test_wandb_records_figures_by_group_and_step(tracked):
    *_, (first, _) = tracked
    rows = history(first)
    assert [(row["_step"], row["step"]) for row in rows] == [(step, step) for step in range(5)]
    for step, row in enumerate(rows):
        assert row["train/loss"] == 7.0 / (step + 1) and row["train/tokens"] == 11 * step
        assert row["comm/exposed_s"] == 0.25 and row["mem/peak_bytes"] == 2**40
        assert "train/mfu" not in row and "loss" not in row
    metrics = of_kind("metric", first)
    assert {(metric.get("name"), metric.get("glob_name"), metric.get("step_metric")) for metric in metrics} == {
        ("step", None, None),
        (None, "*", "step"),
    }


def test_wandb_records_the_table_and_the_picture(tracked):
    folder, *_, (first, _) = tracked
    (run, *_) = sorted((folder / "wandb").glob("offline-run-*"))
    last = history(first)[-1]
    (table,) = (run / "files").glob("media/table/eval/answers_*.table.json")
    assert json.loads(table.read_text())["data"] == [["a, b?", 1], ["c", 0]]
    assert json.loads(table.read_text())["columns"] == ["question", "right"]
    (picture,) = (run / "files").glob("media/images/eval/picture_*.png")
    assert picture.read_bytes() == (folder / "picture.png").read_bytes()
    assert last["_step"] == 4 and {name.split(".")[0] for name in last} >= {"eval/answers", "eval/picture"}


def test_wandb_records_the_manifest_of_each_start(tracked):
    folder, *_, read = tracked
    for name, run, records_of_it in zip(
        ("first", "second"), sorted((folder / "wandb").glob("offline-run-*")), read, strict=True
    ):
        assert json.loads((run / "files" / "manifest.json").read_text()) == {"module": f"recipes.{name}"}
        saved = [file["path"] for files in of_kind("files", records_of_it) for file in files["files"]]
        assert "manifest.json" in saved, "the manifest is synced too"


def test_wandb_records_a_reference_to_the_checkpoint_without_copy(tracked):
    folder, run_id, _, (first, _) = tracked
    (artifact,) = [a for a in of_kind("artifact", first) if a["type"] == "checkpoint"]
    (content,) = artifact["manifest"]["contents"]
    assert artifact["name"] == f"checkpoint-{run_id}"
    assert content["ref"] == (folder / "checkpoint-5" / "weights.bin").as_uri()
    assert content["path"] == "weights.bin" and "local_path" not in content
    content_digest = base64.b64encode(hashlib.md5(bytes(1013)).digest()).decode()
    assert content["digest"] != content_digest  # the checkpoint is not even read
    stored = [os.environ[f"WANDB_{name}_DIR"] for name in ("DATA", "CACHE")] + [folder / "wandb"]
    assert not [path for root in stored for path in Path(root).rglob("*") if path.is_file() and _is_copy(path)]


def _is_copy(path: Path) -> bool:
    return path.read_bytes() == bytes(1013)


def test_wandb_resumes_under_the_same_id(tracked):
    folder, run_id, _, (_, second) = tracked
    run, *_ = of_kind("run", second)
    assert run["run_id"] == run_id
    assert [(row["_step"], row["train/loss"]) for row in history(second)] == [(s, 7.0 / (s + 1)) for s in range(3, 7)]
    assert [line["step"] for line in lines(folder)] == list(range(7))
