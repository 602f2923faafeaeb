"""recipes.spd_sensitivity and spd_adapt: from a model to one that drops reductions, interrupted and not."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from longctx.spd.plan import saved_plan
from recipes import chat, export, generate, pretrain, spd_adapt, spd_sensitivity
from recipes.common import cli as recipe_cli
from tests.tracking import history, of_kind, records

TEXT = ("data.length=31", "data.end_token=false", "sequences=5", "chunk=2", "run.threads=1")
REPAIR = (
    "repair.sequences=24", "repair.length=31", "repair.held_out=5", "repair.looked_at=3", "repair.epochs=2",
    "repair.batch=3", "repair.lr=5e-5", "repair.distil=[ISB,SB,ESB]", "repair.group=[ISB,SB,ESB]",
    "joint.steps=3", "joint.batch=2", "joint.lr=5e-5", "joint.save_every=2",
)  # fmt: skip
PROMPT = ("prompt.text=It was", "max_new_tokens=5", "verify=true", "run.threads=1")


@pytest.fixture(scope="module")
def adapted(tiny: Path, wandb_at_home: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, both of whose blocks have learned to drop, and do."""
    import sys

    from recipes.common import cli as recipe_cli

    out = tmp_path_factory.mktemp("adapted")
    before, sys.argv = (
        sys.argv,
        ["spd_adapt", f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={out}", "track=wandb", *TEXT, *REPAIR],
    )
    try:
        recipe_cli.main("spd_adapt", spd_adapt.task)
    finally:
        sys.argv = before
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
    return out


def tensors(folder: Path, name: str = "spd.safetensors") -> dict[str, list[float]]:
    with safe_open(folder / name, "pt") as file:
        return {name: file.get_tensor(name).flatten().tolist() for name in sorted(file.keys())}


def test_sensitivity_is_written_drawn_and_resumed(cli, tiny, tmp_path):
    command = (f"model={tiny}", "mesh.tp=3", f"out={tmp_path}", *TEXT)
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command)
    assert code == 0, err
    told = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [block["block"] for block in told["blocks"]] == [0, 1] and sorted(told["order"]) == [0, 1]
    assert told["blocks"][0]["perplexity"] - told["blocks"][1]["perplexity"] == pytest.approx(
        told["blocks"][0]["score"]
    )
    assert told["blocks"][1]["perplexity"] - told["perplexity"] == pytest.approx(told["blocks"][1]["score"])
    assert "<svg" in (tmp_path / "sensitivity.svg").read_text()
    assert told["command"].startswith("python -m recipes.spd_sensitivity model=")
    # Interrupted in the second of three chunks, on two data-parallel ranks as well: the same.
    sums = (tmp_path / "sums.jsonl").read_text().splitlines(keepends=True)
    assert len(sums) == 4
    (tmp_path / "sums.jsonl").write_text("".join(sums[:2]) + sums[2][:7])
    (tmp_path / "sensitivity.json").unlink()
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command, "mesh.dp=2")
    assert code == 0, err
    again = json.loads((tmp_path / "sensitivity.json").read_text())
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *command)
    assert code == 0, "what was torn is gone"
    assert [b["score"] for b in again["blocks"]] == pytest.approx([b["score"] for b in told["blocks"]], abs=1e-9)


def test_an_adapted_model_is_one_that_every_recipe_takes(cli, adapted):
    saved = saved_plan(adapted)
    assert saved and saved.plan.dropped == (0, 1) and saved.adapted == (0, 1)
    names = tensors(adapted)
    assert {name for name in names if name.startswith("dropped.")} == {
        f"dropped.{name}" for name in names if name.startswith("model.layers.")
    }
    texts = []
    for more in ([], ["spd=none"], ["spd.budget=0.5"], ["mesh.ring=2"]):
        code, out, err = cli(generate, generate.task, f"model={adapted}", "mesh.tp=3", *PROMPT, *more)
        assert code == 0, err
        texts.append(out)
        dropped = {"spd=none": "", "spd.budget=0.5": "in 1 blocks"}.get("".join(more), "in 2 blocks: 0, 1")
        assert ("reductions dropped" in err) == bool(dropped) and dropped in err
        if more in ([], ["spd.budget=0.5"]):
            assert "nothing to compare with" in err
        else:
            difference = float(re.search(r"largest logit difference +(\S+)", err)[1])
            assert difference < 1e-5, "a ring changes nothing; with nothing dropped, tensor parallelism does not either"
    assert texts[0] == texts[3]


def test_blocks_drop_in_the_order_in_which_they_change_predictions(adapted):
    lines = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    alone = [line["spd/divergence_alone"] for line in lines[:2]]
    assert min(alone) > 0 and saved_plan(adapted).order == tuple(sorted((0, 1), key=lambda block: alone[block]))


def test_the_run_s_record_has_every_block_and_every_step_together(adapted):
    lines = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[:2]:
        assert {"spd/sensitivity", "spd/error_distilled", "spd/joint_divergence"} <= set(line)
    assert lines[2]["spd/joint_divergence"] > 0 and lines[2]["spd/divergence_before"] > 0
    # What has learned together is taken if it is the better one.
    helped = lines[2]["spd/divergence_after"] < lines[2]["spd/divergence_before"]
    taken = tensors(adapted, "joint_1/000.safetensors" if helped else "blocks/000.safetensors")
    assert {name: tensors(adapted)[f"dropped.{name}"] for name in taken} == taken


def test_what_learning_together_makes_worse_is_left_out(cli, tiny, adapted, tmp_path):
    shutil.copytree(adapted / "blocks", tmp_path / "blocks")
    shutil.copy(adapted / "sensitivity.json", tmp_path)
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={tmp_path}", *TEXT, *REPAIR, "joint.lr=1")
    code, _, err = cli(spd_adapt, spd_adapt.task, *words)
    assert code == 0 and "learning together made that" in err, err
    found = tensors(tmp_path)
    for name, tensor in tensors(adapted, "blocks/000.safetensors").items():
        assert found[f"dropped.{name}"] == tensor


def test_wandb_has_the_run_and_where_the_model_is(adapted):
    read = records(next((adapted / "wandb").glob("offline-run-*")))
    (run, *_) = of_kind("run", read)
    config = run["config"]["update"]
    assert run["job_type"] == "spd" and config["machine"]["host"] and config["mesh"]["tp"] == 3
    assert {row["_step"] for row in history(read)} == {0, 1, 2}
    (artifact,) = [record["artifact"] for record in read if record["type"] == "artifact"]
    refers_to = {content["ref"] for content in artifact["manifest"]["contents"]}
    assert artifact["name"] == f"spd-{adapted.name}" and (adapted / "spd_plan.json").as_uri() in refers_to


def test_what_a_block_has_learned_helps(adapted):
    for block in (0, 1):
        with safe_open(adapted / "blocks" / f"{block:03d}.safetensors", "pt") as file:
            told = file.metadata()
        assert 0 < float(told["distilled"]) < float(told["zero_shot"])


def test_with_nothing_dropped_it_is_the_model_that_it_was_made_from(cli, tiny, adapted):
    answers = [
        cli(generate, generate.task, f"model={folder}", *PROMPT, *more)[1]
        for folder, more in ((tiny, []), (adapted, ["spd=none", "mesh.tp=3"]), (adapted, ["spd=none"]))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_killed_run_goes_on_behind_its_last_block_to_the_same_model(cli, tiny, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "out")
    out = tmp_path / "out"
    for file in ("config.json", "spd.safetensors", "spd_plan.json", "blocks/001.safetensors"):
        (out / file).unlink()
    before = (out / "blocks" / "000.safetensors").stat().st_mtime_ns
    # Of what all have learned together nothing is left but the last state.
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
    assert tensors(out, "blocks/001.safetensors") == tensors(adapted, "blocks/001.safetensors")
    assert tensors(out) == tensors(adapted)
    # None of this learning, and another share of blocks, go on from the same blocks; of those the best are taken.
    words = (f"model={tiny}", "mesh.tp=3", f"out={out}", *TEXT, *REPAIR)
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=1", "joint.steps=0")
    assert code == 0, err
    found = tensors(out)
    for name, tensor in tensors(out, "blocks/000.safetensors").items():
        assert found[f"dropped.{name}"] == tensor
    best, worst = saved_plan(out).order
    told = json.loads((out / "sensitivity.json").read_text())
    (out / "sensitivity.json").write_text(json.dumps({**told, "order": [worst, best]}))
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=0.5")
    assert code == 0, err
    assert saved_plan(out).plan.dropped == (best,)
    assert (out / "blocks" / "000.safetensors").stat().st_mtime_ns == before
    # What another block has learned at this share, before it was known to be worse, is not gone on from.
    (file,) = (out / "joint_0.5").glob("step-*/run.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "order": [worst]}))
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=0.5")
    assert code == 0, err
    assert saved_plan(out).plan.dropped == (best,) and json.loads(file.read_text())["order"] == [best]
    code, _, err = cli(spd_adapt, spd_adapt.task, *words, "spd.budget=1", "joint.lr=1e-3")
    assert code == 2 and "has learned with another joint: give another out=" in err


def test_asked_to_stop_it_keeps_what_is_done_and_goes_on(cli, tiny, adapted, tmp_path):
    """As a job's script asks: again and again, from the first repaired block on."""
    words = (f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={tmp_path}", *TEXT, *REPAIR)
    shutil.copy(adapted / "sensitivity.json", tmp_path)
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
    assert tensors(tmp_path) == tensors(adapted)


@pytest.mark.parametrize("more", [["repair.inputs=student"], ["repair.own_norms=true"], ["repair.grouping=shards"]])
def test_other_ways_of_repair_give_a_model_too(cli, tiny, adapted, tmp_path, more):
    sensitivity = f"spd.sensitivity={adapted}/sensitivity.json"
    command = (f"model={tiny}", "mesh.tp=3", "spd.budget=0.5", sensitivity, f"out={tmp_path}", *TEXT, *REPAIR, *more)
    code, _, err = cli(spd_adapt, spd_adapt.task, *command)
    assert code == 0, err
    assert len(saved_plan(tmp_path).adapted) == 1
    for share in ("0.5", "1"):  # blocks that have not been adapted may drop as well
        code, _, err = cli(generate, generate.task, f"model={tmp_path}", "mesh.tp=3", f"spd.budget={share}", *PROMPT)
        assert code == 0, err


def test_blocks_may_drop_in_training_and_the_run_says_so(cli, tmp_path):
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


def test_the_shipped_settings_find_enough_text(smollm2, tmp_path):
    """Of the documentation that every CPython has, by the tokenizer of the model that they are for."""
    words = ("mesh.tp=3", "spd.budget=0.5", "data.sources=[{pydoc:train}]", f"out={tmp_path}")
    job = spd_adapt.prepare(recipe_cli.composed("spd_adapt", words))
    assert len(job.joint_text) == job.joint.steps * job.joint.batch > 0
    held_out, learned = ({tuple(row) for row in rows.tolist()} for rows in (job.unseen, job.joint_text.tokens))
    assert len(held_out) == job.repair.held_out and not held_out & learned, "the text begins anew, but for these"


def test_what_cannot_be_done_is_refused_before_any_rank_starts(refused, tiny, adapted, tmp_path):
    def adapt(*settings: str) -> str:
        return refused(spd_adapt, spd_adapt.task, f"model={tiny}", f"out={tmp_path}", *TEXT, *REPAIR, *settings)

    assert "use mesh.tp=2 or more" in adapt()
    assert "(possible: 1, 3)" in adapt("mesh.tp=2")
    assert "has no use for mesh.ring=2" in adapt("mesh.tp=3", "mesh.ring=2")
    assert "repair.batch=30 of repair.sequences=24" in adapt("mesh.tp=3", "repair.batch=30")
    assert "say how many with spd.budget" in adapt("mesh.tp=3", "spd.budget=null")
    assert "spd.budget=0.2 of 2 blocks is none" in adapt("mesh.tp=3", "spd.budget=0.2")
    assert "joint.batch=3 is shared by mesh.dp=2" in adapt("mesh.tp=3", "mesh.dp=2", "joint.batch=3", "spd.budget=1")
    assert "not 99999" in adapt("mesh.tp=3", "sequences=99999")
    assert "in model.dtype=float32" in adapt("mesh.tp=3", "model.dtype=bfloat16")
    assert "with another sequences" in refused(
        spd_adapt, spd_adapt.task, f"model={tiny}", f"out={adapted}", "mesh.tp=3", *TEXT, *REPAIR, "repair.sequences=21"
    )
    says = refused(generate, generate.task, f"model={adapted}", *PROMPT)
    assert "was made for mesh.tp=3, this is mesh.tp=1: use that, or spd=none" in says
    says = refused(chat, chat.task, f"model={tiny}", "mesh.tp=3", "spd=ranked", "turns=nowhere.jsonl")
    assert "say with spd.budget" in says
    assert "transformers cannot run it" in refused(export, export.task, f"checkpoint={adapted}", f"to={tmp_path}/hf")
