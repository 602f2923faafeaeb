"""recipes.spd_adapt after an interruption, and on the folder of an earlier run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from longctx.checksum import with_checksum
from longctx.spd.plan import saved_plan
from recipes import spd_adapt
from recipes.common import cli as recipe_cli
from recipes.common.overrides import as_overrides
from tests.recipes.spd.conftest import REPAIR, TEXT, tensors


def test_killed_run_resumes_after_its_last_block_and_state(cli, tiny, adapted_folder, tmp_path):
    shutil.copytree(adapted_folder, tmp_path / "out")
    out = tmp_path / "out"
    for file in ("config.json", "spd.safetensors", "spd_plan.json", "blocks/001.safetensors"):
        (out / file).unlink()
    before = (out / "blocks" / "000.safetensors").stat().st_mtime_ns
    # 1. The last state is all that remains of joint distillation.  The run ends with the same model.
    for file in (out / "joint_1").glob("*.safetensors"):
        file.unlink()
    code, _, err = cli(
        spd_adapt,
        spd_adapt.task,
        f"model={tiny}",
        "mesh.tp=3",
        "mesh.dp=2",
        "spd.budget=1",
        f"out={out}",
        *TEXT,
        *REPAIR,
    )
    assert code == 0, err
    assert (out / "blocks" / "000.safetensors").stat().st_mtime_ns == before
    assert tensors(out, "blocks/001.safetensors") == tensors(adapted_folder, "blocks/001.safetensors")
    assert tensors(out) == tensors(adapted_folder)
    # 2. A run without joint distillation uses the same repaired blocks.
    words = (f"model={tiny}", "mesh.tp=3", f"out={out}", *TEXT, *REPAIR)
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=1", "joint.steps=0")
    assert code == 0, err
    saved = tensors(out)
    for name, tensor in tensors(out, "blocks/000.safetensors").items():
        assert saved[f"dropped.{name}"] == tensor
    # 3. A smaller share drops the best repaired block, even if its sensitivity ranks it last.
    best, worst = saved_plan(out).order
    sensitivity = json.loads((out / "sensitivity.json").read_text())
    (out / "sensitivity.json").write_text(json.dumps({**sensitivity, "order": [worst, best]}))
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=0.5")
    assert code == 0, err
    assert saved_plan(out).plan.dropped == (best,)
    assert (out / "blocks" / "000.safetensors").stat().st_mtime_ns == before
    # 4. A joint state of another block at this share is not resumed.
    (file,) = (out / "joint_0.5").glob("step-*/run.json")
    file.write_text(json.dumps(with_checksum({**json.loads(file.read_text()), "order": [worst]})))
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=0.5")
    assert code == 0, err
    assert saved_plan(out).plan.dropped == (best,) and json.loads(file.read_text())["order"] == [best]
    # 5. A joint state of other settings is refused.
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=1", "joint.lr=1e-3")
    assert code == 2 and "with other values of joint: use another out=" in err


def test_run_asked_to_stop_exits_75_and_resumes_to_the_same_model(cli, tiny, adapted_folder, tmp_path):
    """A job script repeats the signal; here from the first repaired block on."""
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={tmp_path}", *TEXT, *REPAIR)
    shutil.copy(adapted_folder / "sensitivity.json", tmp_path)
    with (tmp_path / "said").open("w") as file:
        run = subprocess.Popen([sys.executable, "-m", "recipes.spd_adapt", *words], stderr=file)
        while run.poll() is None:
            if any(tmp_path.glob("blocks/*.safetensors")):
                run.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
    said = (tmp_path / "said").read_text()
    assert run.returncode == recipe_cli.STOPPED and "stopped, as asked: the same command resumes" in said, said
    assert not (tmp_path / "spd_plan.json").exists()
    assert cli(spd_adapt, spd_adapt.task, *words)[0] == 0
    assert tensors(tmp_path) == tensors(adapted_folder)


def files_below(folder: Path) -> dict[Path, int]:
    """Every file and folder below ``folder``, with its time of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_checking_writes_nothing(tiny, adapted_folder, tmp_path):
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", *TEXT, *REPAIR)
    before = files_below(adapted_folder)
    for out in (tmp_path / "new", adapted_folder):
        job = spd_adapt.prepare(
            recipe_cli.compose_config("spd_adapt", as_overrides("spd_adapt", [*words, f"out={out}"], print))
        )
        assert job.out == out
    assert not (tmp_path / "new").exists() and files_below(adapted_folder) == before


def test_states_with_the_old_key_looked_at_are_resumed(cli, tiny, adapted_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(adapted_folder, out)
    (state,) = (out / "joint_1").glob("step-*/run.json")
    for file in (out / "blocks" / "about.json", state):
        values = json.loads(file.read_text())
        values["looked_at"] = values.pop("calibration_sequences")
        values = {key: value for key, value in values.items() if key not in ("checksums", "crc32")}  # as in version 0.1
        file.write_text(json.dumps(values) + "\n")
    before = {path: time for path, time in files_below(out).items() if path.parent in (out / "blocks", state.parent)}
    (out / "config.json").unlink()
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={out}", *TEXT, *REPAIR)
    code, _, err = cli(spd_adapt, spd_adapt.task, *words)
    assert code == 0, err
    assert tensors(out) == tensors(adapted_folder) and before.items() <= files_below(out).items()
    for name, value in (("calibration_sequences", "4"), ("weights", "beginnings")):
        code, _, err = cli(spd_adapt, spd_adapt.task, *words, f"repair.{name}={value}")
        assert code == 2 and f"with other values of {name}: use another out=" in err
