"""recipes.spd_adapt on a tiny model: results, resumption, refusals."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors import safe_open

from longctx.checksum import with_checksum
from longctx.spd import guards
from longctx.spd.plan import saved_plan
from recipes import chat, export, generate, pretrain, spd_adapt
from recipes.common import cli as recipe_cli
from recipes.common.overrides import as_overrides
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer
from tests.tracking import history, of_kind, records

TEXT = ("data.length=31", "data.end_token=false", "sequences=5", "chunk=2", "run.threads=1")
REPAIR = (
    "repair.sequences=24", "repair.length=31", "repair.held_out=5", "repair.calibration_sequences=3", "repair.epochs=2",
    "repair.batch=3", "repair.lr=5e-5", "repair.distil=[ISB,SB,ESB]", "repair.group=[ISB,SB,ESB]",
    "joint.steps=3", "joint.batch=2", "joint.lr=5e-5", "joint.save_every=2",
)  # fmt: skip
PROMPT = ("prompt.text=It was", "max_new_tokens=5", "verify=true", "run.threads=1")


@pytest.fixture(scope="module")
def adapted_folder(tiny: Path, wandb_at_home: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the adapted tiny model; both of its blocks are repaired and drop."""
    out = tmp_path_factory.mktemp("adapted")
    words = [f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={out}", "track=wandb", *TEXT, *REPAIR]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spd_adapt", *words])
        try:
            recipe_cli.main("spd_adapt", spd_adapt.task)
        finally:
            GlobalHydra.instance().clear()
    return out


def tensors(folder: Path, name: str = "spd.safetensors") -> dict[str, list[float]]:
    """Values of every tensor in a safetensors file, by tensor name."""
    with safe_open(folder / name, "pt") as file:
        return {name: file.get_tensor(name).flatten().tolist() for name in sorted(file.keys())}


def test_generate_runs_an_adapted_model_with_any_share_dropped(cli, adapted_folder):
    saved = saved_plan(adapted_folder)
    assert saved and saved.plan.dropped == (0, 1) and saved.adapted == (0, 1)
    names = tensors(adapted_folder)
    assert {name for name in names if name.startswith("dropped.")} == {
        f"dropped.{name}" for name in names if name.startswith("model.layers.")
    }
    texts = []
    for more in ([], ["spd=none"], ["spd.budget=0.5"], ["mesh.ring=2"]):
        code, out, err = cli(generate, generate.task, f"model={adapted_folder}", "mesh.tp=3", *PROMPT, *more)
        assert code == 0, err
        texts.append(out)
        dropped = {"spd=none": "", "spd.budget=0.5": "in 1 blocks"}.get("".join(more), "in 2 blocks: 0, 1")
        assert ("reductions dropped" in err) == bool(dropped) and dropped in err
        if more in ([], ["spd.budget=0.5"]):
            assert "nothing to compare with" in err
        else:
            difference = float(re.search(r"largest logit difference +(\S+)", err)[1])
            assert difference < 1e-5, "neither a ring nor, with nothing dropped, tensor parallelism changes logits"
    assert texts[0] == texts[3]


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


def test_adapted_model_with_nothing_dropped_answers_as_the_original(cli, tiny, adapted_folder):
    answers = [
        cli(generate, generate.task, f"model={folder}", *PROMPT, *more)[1]
        for folder, more in ((tiny, []), (adapted_folder, ["spd=none", "mesh.tp=3"]), (adapted_folder, ["spd=none"]))
    ]
    assert answers[0] == answers[1] == answers[2]


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
    assert code == 2 and "with another joint: use another out=" in err


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


@pytest.mark.parametrize("more", [["repair.inputs=student"], ["repair.own_norms=true"], ["repair.grouping=shards"]])
def test_other_repair_settings_give_a_model_that_runs(cli, tiny, adapted_folder, tmp_path, more):
    sensitivity = f"spd.sensitivity={adapted_folder}/sensitivity.json"
    command = (f"model={tiny}", "mesh.tp=3", "spd.budget=0.5", sensitivity, f"out={tmp_path}", *TEXT, *REPAIR, *more)
    code, _, err = cli(spd_adapt, spd_adapt.task, *command)
    assert code == 0, err
    assert len(saved_plan(tmp_path).adapted) == 1
    for share in ("0.5", "1"):  # a block that was not repaired may drop as well
        code, _, err = cli(generate, generate.task, f"model={tmp_path}", "mesh.tp=3", f"spd.budget={share}", *PROMPT)
        assert code == 0, err


def test_training_drops_blocks_and_refuses_to_resume_without_them(cli, tmp_path):
    command = (
        "experiment=pretrain/tiny",
        "data.length=61",
        "data.batch=2",
        "evaluate.every=0",
        "run.threads=1",
        "mesh.tp=2",
    )
    code, _, err = cli(pretrain, pretrain.task, *command, "spd.blocks=[1,3]", "steps=2", f"out={tmp_path}")
    assert code == 0, err
    code, _, err = cli(pretrain, pretrain.task, *command, "steps=3", f"out={tmp_path}")
    assert code == 2 and "was made with mesh.tp=2 spd.blocks=[1, 3]: use that" in err
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}", f"to={tmp_path / 'hf'}")
    assert code == 2 and "drops reductions of blocks [1, 3] between 2 tensor-parallel ranks" in err


def test_default_settings_find_enough_text_and_hold_some_out(smollm2, tmp_path):
    """The default text, CPython's documentation, by the default model's tokenizer."""
    words = ("mesh.tp=3", "spd.budget=0.5", "data.sources=[{pydoc:train}]", f"out={tmp_path}")
    job = spd_adapt.prepare(recipe_cli.compose_config("spd_adapt", words))
    assert len(job.joint_text) == job.joint.steps * job.joint.batch > 0
    held_out, learned = ({tuple(row) for row in rows.tolist()} for rows in (job.held_out_tokens, job.joint_text.tokens))
    assert len(held_out) == job.repair.held_out and not held_out & learned, (
        "the text starts again without the held-out sequences"
    )


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
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "repair.calibration_sequences=4")
    assert code == 2 and "with another calibration_sequences: use another out=" in err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mixtral", "a mixture of experts, in which each rank would choose experts by its own partial sum"),
        ("gemma3", "not tested on models that normalise or scale the outputs of attention"),
    ],
)
def test_models_on_which_repair_is_not_tested_are_refused(refused, tmp_path, capsys, kind, words):
    model = random_model(kind, tmp_path / "model", vocab_size=307, eos_token_id=None)
    tiny_tokenizer().save_pretrained(model)
    settings = (f"model={model}", "mesh.tp=2", "spd.budget=1", f"out={tmp_path / 'out'}", *TEXT, *REPAIR)
    capsys.readouterr()  # the progress bar of saving
    assert words in refused(spd_adapt, spd_adapt.task, *settings)


def test_unfit_settings_are_refused_before_any_rank_starts(refused, tiny, adapted_folder, tmp_path):
    def adapt(*settings: str) -> str:
        return refused(spd_adapt, spd_adapt.task, f"model={tiny}", f"out={tmp_path}", *TEXT, *REPAIR, *settings)

    assert "use mesh.tp=2 or more" in adapt()
    assert "(possible: 1, 3)" in adapt("mesh.tp=2")
    assert "has no use for mesh.ring=2" in adapt("mesh.tp=3", "mesh.ring=2")
    assert "repair.batch=30 is more than repair.sequences=24" in adapt("mesh.tp=3", "repair.batch=30")
    assert "spd.budget=None: " in (says := adapt("mesh.tp=3", "spd.budget=null")) and "spd.budget=0.5" in says
    assert "spd.budget=0.2 of 2 blocks drops none: use 0.25 or more" in adapt("mesh.tp=3", "spd.budget=0.2")
    assert "joint.batch=3 is not a multiple of mesh.dp=2: use joint.batch=4" in adapt(
        "mesh.tp=3", "mesh.dp=2", "joint.batch=3", "spd.budget=1"
    )
    assert "not 99999" in adapt("mesh.tp=3", "sequences=99999")
    assert "recipes.spd_adapt needs model.dtype=float32" in adapt("mesh.tp=3", "model.dtype=bfloat16")
    assert "with another sequences" in refused(
        spd_adapt,
        spd_adapt.task,
        f"model={tiny}",
        f"out={adapted_folder}",
        "mesh.tp=3",
        *TEXT,
        *REPAIR,
        "repair.sequences=21",
    )
    says = refused(generate, generate.task, f"model={adapted_folder}", *PROMPT)
    assert "was made for mesh.tp=3, but here 1 rank has the weights: use mesh.tp=3 (or mesh.ring=3" in says
    says = refused(chat, chat.task, f"model={tiny}", "mesh.tp=3", "spd=ranked", "turns=nowhere.jsonl")
    assert "set spd.budget" in says
    assert "transformers cannot run it" in refused(
        export, export.task, f"checkpoint={adapted_folder}", f"to={tmp_path}/hf"
    )
