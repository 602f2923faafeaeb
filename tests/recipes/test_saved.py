"""Files that version 0.1 wrote load with the current code, with the names that settings had in version 0.1."""

import json
import re
import shutil
from pathlib import Path

import hydra
import pytest
import safetensors.torch
import torch
import transformers
from omegaconf import OmegaConf

from eval import run as eval_run
from longctx.hf.checkpoint import same_model
from longctx.spd.folder import read_block
from recipes import chat, compare, export, generate, pretrain, reproduce, spd_adapt, spd_sensitivity
from recipes.common import cli as recipe_cli
from recipes.common.manifest import flat
from recipes.common.overrides import CONFIGS
from recipes.common.renamed import SETTINGS

SAVED = Path(__file__).parents[1] / "saved" / "v0_1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
TRAIN = (
    "model=tiny", "model.config.hidden_size=8", "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2", "model.config.head_dim=4", "model.config.intermediate_size=16",
    "model.config.max_position_embeddings=256", "model.cache=cache", "data=text",
    "data.sources=[{path:inputs/train.txt}]", "data.test=[{path:inputs/test.txt}]", "data.length=64", "data.batch=2",
    "optim.warmup=2", "optim.decay_steps=8", "optim.lr=1e-2", "evaluate.every=2", "evaluate.batches=1",
    "evaluate.buckets=2", "checkpoint.every=2", "checkpoint.keep=1", "threads=1",
)  # fmt: skip
SPD = (
    "model=model", "mesh.tp=2", "data=text", "data.sources=[{path:inputs/train.txt}]", "data.length=31",
    "data.end_token=false", "data.batch=1", "sequences=5", "chunk=2", "threads=1",
)  # fmt: skip
REPAIR = (
    "repair.sequences=24", "repair.length=31", "repair.held_out=5", "repair.looked_at=3", "repair.epochs=2",
    "repair.batch=3", "repair.lr=5e-3", "joint.steps=3", "joint.batch=2", "joint.lr=5e-4", "joint.save_every=2",
)  # fmt: skip
VARIANTS = (
    "variants=[{name:ring,mesh:{ring:2}},"
    "{name:dropped,mesh:{tp:2},spd:{drop:ranked,budget:0.5,sensitivity:spd_sensitivity/sensitivity.json}}]"
)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A copy of the saved files as the current folder; their config.json states the installed transformers version."""
    folder = tmp_path / "v0_1"
    shutil.copytree(SAVED, folder)
    for config in folder.glob("train_*/model/config.json"):
        config.write_text(config.read_text().replace('"5.23.0"', f'"{transformers.__version__}"'))
    monkeypatch.chdir(folder)
    return folder


def token_ids(file):
    return json.loads(file.read_text())["token_ids"]


def choices_and_numbers(choices):
    """Return each chosen strategy with the numbers in its reason, whose wording may change."""
    return [[strategy, re.findall(r"\d[\d.,]*\b", why)] for strategy, why in choices]


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mesh", ["mesh.ring=2", "mesh.tp=2"])
def test_session_resumes(cli, saved, mesh):
    words = ("threads=1", "turns=inputs/more_turns.jsonl", "session.load=chat/session", "out=turns.json")
    code, _, err = cli(chat, chat.task, "model=model", mesh, *words)
    assert code == 0, err
    assert "threads=1 is an old name: use run.threads=1" in err
    turns = json.loads((saved / "turns.json").read_text())["turns"]
    assert [turn["token_ids"] for turn in turns] == EXPECTED["chat"]["more_turns_token_ids"]
    assert [[turn["new"], turn["cached"]] for turn in turns] == EXPECTED["chat"]["more_turns_new_cached"]


def test_session_of_another_model_is_refused(refused, saved):
    words = ("turns=inputs/more_turns.jsonl", "session.load=chat/session")
    assert "is of another model" in refused(chat, chat.task, "model=exported", *words)


def test_session_of_an_adapted_model_resumes(cli, saved):
    words = ("mesh.tp=2", "turns=inputs/more_turns.jsonl", "session.load=chat_spd/session", "out=turns.json")
    code, _, err = cli(chat, chat.task, "model=spd_adapted", "threads=1", *words)
    assert code == 0, err
    turns = json.loads((saved / "turns.json").read_text())["turns"]
    assert [turn["token_ids"] for turn in turns] == EXPECTED["chat_spd"]["more_turns_token_ids"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("train_ring", ("model.config.num_hidden_layers=2", "mesh.ring=2", "optim.zero1=false")),
        ("train_zero1", ("model.config.num_hidden_layers=1", "mesh.ring=2", "optim.zero1=true")),
    ],
)
def test_training_resumes(cli, saved, run, words):
    before = read_lines(saved / run / "metrics.jsonl")[:4]
    code, _, err = cli(pretrain, pretrain.task, *TRAIN, *words, "steps=6", f"out={run}")
    assert code == 0, err
    lines = {line["step"]: line for line in read_lines(saved / run / "metrics.jsonl")}
    assert [lines[step] for step in range(1, 5)] == before, "steps before the checkpoint are not trained again"
    for step in (5, 6):
        for name, value in EXPECTED[run]["to_step_8_ring2"][str(step)].items():
            assert lines[step][name] == pytest.approx(value, rel=1e-6), (step, name)


def test_training_with_other_settings_is_refused(cli, saved, no_ranks_start):
    words = ("model.config.num_hidden_layers=2", "mesh.ring=2", "optim.zero1=true", "steps=6", "out=train_ring")
    code, _, err = cli(pretrain, pretrain.task, *TRAIN, *words)
    assert code == 2 and "was made with optim.zero1=false: use that" in err, err


def test_checkpoint_exports_the_same_bytes(cli, saved):
    code, _, err = cli(export, export.task, "checkpoint=train_ring", "to=again")
    assert code == 0, err
    assert "train_ring/checkpoints/step-00000004 was written by a version without checksums" in err
    weights = "model.safetensors"
    assert (saved / "again" / weights).read_bytes() == (saved / "exported" / weights).read_bytes()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("model=exported", "prompt.text=The river", "max_new_tokens=6"), "generate_exported"),
        (
            ("model=model", "mesh.tp=2", "spd=ranked", "spd.sensitivity=spd_sensitivity/sensitivity.json",
             "spd.budget=0.5", "prompt.text=It was", "max_new_tokens=8"),
            "generate_ranked",
        ),
        (("model=spd_adapted", "mesh.tp=2", "prompt.text=It was", "max_new_tokens=8"), "generate_adapted"),
        (
            ("model=model", "mesh.ring=2", "context.decode=one_exchange", "prompt.text=The quick brown fox, as ever.",
             "max_new_tokens=12"),
            "generate",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_and_orders_give_the_same_tokens(cli, saved, words, name):
    code, _, err = cli(generate, generate.task, *words, "threads=1", "out=result.json")
    assert code == 0, err
    assert token_ids(saved / "result.json") == EXPECTED[name]
    if "context.decode=one_exchange" in words:
        assert "context.decode=one_exchange is an old name: use context.decode=gather_merge" in err


def test_sensitivities_are_not_measured_again(cli, saved):
    before = json.loads((saved / "spd_sensitivity" / "sensitivity.json").read_text())
    code, _, err = cli(spd_sensitivity, spd_sensitivity.task, *SPD, "out=spd_sensitivity")
    assert code == 0, err
    after = json.loads((saved / "spd_sensitivity" / "sensitivity.json").read_text())
    assert (after["order"], after["blocks"]) == (before["order"], before["blocks"])


def test_repaired_blocks_are_not_repaired_again(cli, saved):
    folder = saved / "spd_adapted"
    results = ("config.json", "spd.safetensors", "spd_plan.json", "joint_0.5/001.safetensors")
    before = {name: (folder / name).read_bytes() for name in results}
    plan_before = json.loads(before.pop("spd_plan.json"))
    source = plan_before.pop("source")
    states = [folder / "blocks" / "001.safetensors", *(folder / "joint_0.5" / "step-00000003").iterdir()]
    written = {state: state.stat().st_mtime_ns for state in states}
    for name in results:
        (folder / name).unlink()
    words = ("spd.budget=0.5", "spd.sensitivity=spd_sensitivity/sensitivity.json", "out=spd_adapted")
    code, _, err = cli(spd_adapt, spd_adapt.task, *SPD, *REPAIR, *words)
    assert code == 0, err
    tensors, _ = read_block(folder / "joint_0.5" / "001.safetensors")
    tensors_before = safetensors.torch.load(before.pop("joint_0.5/001.safetensors"))
    assert all(torch.equal(tensors[name], tensors_before[name]) for name in {**tensors, **tensors_before})
    plan = json.loads((folder / "spd_plan.json").read_text())
    assert {name: plan[name] for name in plan_before} == plan_before, "checksums are new"
    assert same_model(source, plan["source"])
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {state: state.stat().st_mtime_ns for state in states} == written


def test_stored_answers_are_found(saved, monkeypatch, capsys, no_ranks_start):
    words = ["model=model", "eval.tasks=[arc_easy,lambada_openai,wikitext]", "eval.data=inputs/sets"]
    words += ["eval.resamples=200", VARIANTS, "threads=1", "out=eval"]
    before = json.loads((saved / "eval" / "report.json").read_text())
    monkeypatch.setattr("sys.argv", [str(eval_run.__file__), *words])
    recipe_cli.main("evaluate", eval_run.task)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert capsys.readouterr().err.count(": 0 of 35 requests to answer") == 3
    after = json.loads((saved / "eval" / "report.json").read_text())
    for name, about in before["variants"].items():
        assert after["variants"][name] | about == after["variants"][name]
    for task, variants in before["tasks"].items():
        for variant, figures in variants.items():
            now = after["tasks"][task][variant]
            counted = figures.keys() & {"n", "accuracy", "perplexity", "lost", "won", "metrics"}
            assert {name: now[name] for name in counted} == {name: figures[name] for name in counted}


@pytest.mark.parametrize(("rule", "file"), [("auto", "calibrated"), ("empirical", "fitted")])
def test_hardware_files_are_read(cli, saved, rule, file):
    words = (f"context.strategy={rule}", f"hardware=hardware/{file}.yaml", "turns=inputs/turns.jsonl", "out=turns.json")
    code, _, err = cli(chat, chat.task, "model=model", "mesh.ring=2", "threads=1", *words)
    assert code == 0, err
    turns = json.loads((saved / "turns.json").read_text())["turns"]
    assert [turn["token_ids"] for turn in turns] == EXPECTED["chat"]["saved_token_ids"]
    choices = [[turn["strategy"], turn["why"]] for turn in turns if "why" in turn]
    assert choices_and_numbers(choices) == choices_and_numbers(EXPECTED["hardware"][rule])


def test_manifests_are_compared_and_reproduced(saved, capsys):
    compare.compare(["generate", "generate_batch"])
    assert "sampling.temperature" in capsys.readouterr().out
    reproduce.reproduce(["generate"])
    assert "final figures are the same" in capsys.readouterr().err


def test_every_old_setting_is_accepted():
    """Each setting of version 0.1 still exists, or `renamed` has its new name."""
    recipe = ""
    missing = []
    known: set[str] = set()
    for line in (SAVED / "settings.txt").read_text().splitlines():
        if line.startswith("#"):
            recipe = line.lstrip("# ")
            known = current_settings(recipe)
        elif line and known and SETTINGS.get(line, line) not in known and line != "texts.0.called":  # see `ITEMS`
            missing.append(f"{recipe}: {line}")
    assert not missing, missing


def current_settings(recipe):
    """Return the settings of ``recipe``; none for slurm.submit, which Hydra does not compose."""
    name = recipe.replace("bench_", "bench/") if recipe.startswith("bench_") else recipe
    if not (CONFIGS / f"{name}.yaml").is_file() or name == "submit":
        return set()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = hydra.compose(name)
    return set(flat(OmegaConf.to_container(config, resolve=False)))
