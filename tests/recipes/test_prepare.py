"""`prepare` of every recipe only checks: it makes no folder and writes no file, the model cache excepted."""

import json
import shutil

import pytest

from eval import run as eval_run
from recipes import chat, export, extend, generate, pretrain, spd_adapt, spd_sensitivity
from recipes.common.train_resume import begin_run, refuse_other_model
from tests.recipes.conftest import SAVED

TEXT = ("data=text", "data.sources=[{path:inputs/train.txt}]", "data.length=31", "data.batch=1")
SPD = ("model=model", "mesh.tp=2", *TEXT, "data.end_token=false", "sequences=5")
JOBS = {
    "generate": (generate.prepare, "generate", ("model=model", "prompt.text=The river", "out=out/result.json")),
    "generate, a batch": (
        generate.prepare, "generate",
        ("model=model", "prompts=inputs/prompts.jsonl", "out=out/answers.json"),
    ),
    "chat": (
        chat.prepare, "chat",
        ("model=model", "turns=inputs/turns.jsonl", "session.load=session", "session.save=out/talk",
         "out=out/turns.json"),
    ),
    "pretrain": (pretrain.prepare, "pretrain", ("model=tiny", *TEXT, "evaluate.every=0", "out=out")),
    "extend": (
        extend.prepare, "extend",
        ("model=model", "model.max_positions=401", "model.rope_theta=5e4", *TEXT, "evaluate.every=0", "out=out"),
    ),
    "spd_sensitivity": (spd_sensitivity.prepare, "spd_sensitivity", (*SPD, "out=out")),
    "spd_adapt": (
        spd_adapt.prepare, "spd_adapt",
        (*SPD, "repair.sequences=24", "repair.length=31", "repair.held_out=5", "repair.calibration_sequences=3",
         "repair.batch=3", "joint.steps=3", "joint.batch=2", "out=out"),
    ),
    "eval": (
        eval_run.prepare, "evaluate",
        ("model=model", "eval.tasks=[arc_easy]", "eval.data=inputs/sets", "eval.limit=2",
         "variants=[{name:ring,mesh:{ring:2}}]", "out=out"),
    ),
    "export": (export.prepare, "export", ("checkpoint=train_ring", "to=out/hf")),
}  # fmt: skip
FOLDERS = [name for name, (*_, words) in JOBS.items() if "out=out" in words]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """The current folder, with a model of version 0.1, its saved session and checkpoint, and texts."""
    for name in ("model", "inputs", "train_ring"):
        shutil.copytree(SAVED / name, tmp_path / name)
    shutil.copytree(SAVED / "chat" / "session", tmp_path / "session")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("out_exists", [False, True], ids=["out is missing", "out exists"])
@pytest.mark.parametrize(("prepare", "name", "words"), JOBS.values(), ids=JOBS)
def test_prepare_writes_nothing(inputs, config_of, snapshot, out_exists, prepare, name, words):
    if out_exists:
        (inputs / "out").mkdir()
        (inputs / "out" / "notes.json").write_text(json.dumps({"written": "by the user"}))
    config = config_of(name, *words)
    before = snapshot()
    assert prepare(config), "a job"
    assert snapshot() == before
    assert (inputs / "out").exists() == out_exists


@pytest.mark.parametrize("name", ["generate", "pretrain", "spd_sensitivity", "eval"])
def test_prepare_accepts_an_out_below_folders_that_do_not_exist(inputs, config_of, snapshot, name):
    prepare, config_name, words = JOBS[name]
    out = "a/b/result.json" if name == "generate" else "a/b"
    config = config_of(config_name, *[word for word in words if not word.startswith("out=")], f"out={out}")
    before = snapshot()
    assert prepare(config), "a job"
    assert snapshot() == before


@pytest.mark.parametrize("name", ["generate", "chat", "extend", "spd_sensitivity", "spd_adapt", "eval"])
def test_damaged_model_is_refused_by_every_recipe(inputs, config_of, snapshot, name):
    """Damages one file after another, and mends it."""
    prepare, config_name, words = JOBS[name]
    config = config_of(config_name, *words)
    for file, damage, message in (
        ("model.safetensors", lambda content: content[:-1], r"model\.safetensors is truncated or damaged"),
        ("model.safetensors", lambda content: b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
        (
            "config.json",
            lambda content: content.replace(b'"hidden_act"', b'"is_causal": false, "hidden_act"'),
            "is_causal",
        ),
        (
            "config.json",
            lambda content: content.replace(b'"intermediate_size": 32', b'"intermediate_size": 31'),
            "shape",
        ),
        ("generation_config.json", lambda content: b"{", r"generation_config\.json cannot be read"),
        ("tokenizer.json", lambda content: b"", "has no tokenizer that transformers can read"),
    ):
        content = (inputs / "model" / file).read_bytes()
        (inputs / "model" / file).write_bytes(damage(content))
        before = snapshot()
        with pytest.raises(ValueError, match=message):
            prepare(config)
        assert snapshot() == before
        (inputs / "model" / file).write_bytes(content)


def test_damaged_model_of_a_run_is_not_exported(inputs, config_of):
    (inputs / "train_ring" / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        export.prepare(config_of("export", *JOBS["export"][2]))


def test_linked_and_copied_checkpoints_are_exported_with_their_run(inputs, config_of):
    run, step = inputs / "train_ring", "step-00000004"
    (run / "checkpoints" / step).rename(inputs / "archive")
    (run / "checkpoints" / step).symlink_to(inputs / "archive")  # a link in a run
    for name in ("train_ring", f"train_ring/checkpoints/{step}", f"train_ring/checkpoints/x/../{step}"):
        place, _ = export.prepare(config_of("export", f"checkpoint={name}", "to=out/hf"))
        assert export.model_of(place) == run / "model"
    (run / "checkpoints" / step).unlink()
    (inputs / "archive").rename(run / "checkpoints" / step)
    (inputs / "best").symlink_to(run / "checkpoints" / step)  # a link into a run
    place, _ = export.prepare(config_of("export", "checkpoint=best", "to=out/hf"))
    assert export.model_of(place) == run / "model"
    shutil.copytree(run / "checkpoints" / step, inputs / "far" / "old" / step)
    with pytest.raises(ValueError, match=rf"together with .* to RUN/checkpoints/{step} and RUN/model, then give"):
        export.prepare(config_of("export", f"checkpoint=far/old/{step}", "to=out/hf"))


def test_run_of_another_tokenizer_is_refused(inputs, config_of):
    """The run's folder has a copy, which an export would write beside weights that were trained on other tokens."""
    config = config_of("extend", *JOBS["extend"][2])
    begin_run(job := extend.prepare(config))
    manifest = {"module": "recipes.extend", "out": str(inputs / "out")}
    (inputs / "out" / "manifest.json").write_text(json.dumps(manifest))
    (inputs / "out" / "checkpoints" / "step-00000001").mkdir(parents=True)  # without one, the model would be replaced
    refuse_other_model(job)  # accepts the same model
    file = inputs / "model" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=r"out has a run whose model has another tokenizer\.json"):
        extend.prepare(config)


def test_seed_that_draws_nothing_is_accepted(inputs, config_of):
    """Runs of earlier versions have one in their manifests."""
    assert extend.prepare(config_of("extend", *JOBS["extend"][2], "seed=1")).settings.seed == 1


@pytest.mark.parametrize("name", ["generate", "chat", "pretrain", "extend", "spd_sensitivity", "spd_adapt", "eval"])
def test_refused_prepare_writes_nothing(inputs, config_of, snapshot, name):
    """The mesh is refused after the settings of the run have been read."""
    prepare, config_name, words = JOBS[name]
    config = config_of(config_name, *[word for word in words if not word.startswith("mesh.")], "mesh.tp=3")
    before = snapshot()
    with pytest.raises(ValueError, match=r"mesh\.tp=3"):
        prepare(config)
    assert snapshot() == before


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_another_recipe_is_refused(inputs, config_of, snapshot, name):
    (inputs / "out").mkdir()
    (inputs / "out" / "manifest.json").write_text(json.dumps({"module": "recipes.other", "out": "out"}))
    prepare, config_name, words = JOBS[name]
    config = config_of(config_name, *words)
    before = snapshot()
    with pytest.raises(ValueError, match=r"out=out belongs to a run of recipes\.other: give .* another out="):
        prepare(config)
    assert snapshot() == before


@pytest.mark.parametrize("name", [name for name in JOBS if name != "export"])
def test_launcher_with_another_number_of_ranks_is_refused(inputs, config_of, snapshot, under_torchrun, name):
    """Refused once the ranks are to start, the run's folder would exist already."""
    prepare, config_name, words = JOBS[name]
    config = config_of(config_name, *words)
    under_torchrun(0, 7)
    before = snapshot()
    with pytest.raises(ValueError, match=r"the launcher started 7 ranks, but .*has [12]"):
        prepare(config)
    assert snapshot() == before


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("pretrain", "export")])
def test_tokens_beyond_the_vocabulary_are_refused(inputs, config_of, snapshot, name):
    """With tp=2, such a token would silently be a row of zeros."""
    tokenizer = json.loads((inputs / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 5000
    (inputs / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    prepare, config_name, words = JOBS[name]
    config = config_of(config_name, *[word for word in words if not word.startswith("session.load")])
    before = snapshot()
    with pytest.raises(ValueError, match=r"token 5,000, beyond the model's vocabulary of"):
        prepare(config)
    assert snapshot() == before
