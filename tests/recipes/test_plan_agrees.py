"""recipes.plan takes and refuses the meshes that the recipes take and refuse."""

import random
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from longctx.config import Mesh
from longctx.model_shape import ModelShape
from longctx.models import FAMILIES
from recipes import plan, pretrain
from recipes.common import target
from recipes.common.hardware_file import read_machine
from recipes.common.plan_question import Question, WorkSettings
from recipes.common.planning import meshes_of, refusal_of
from tests.cost.predict import shape_named
from tests.megatron.kinds import EVEN_EXPERTS, KINDS

GTT = read_machine("h100_gtt")


@cache
def shape_of_kind(kind):
    """Return the shape of a small model of ``kind``, with a number of experts that ranks can divide."""
    with tempfile.TemporaryDirectory() as folder:
        type(KINDS[kind])(**KINDS[kind].to_dict() | EVEN_EXPERTS.get(kind, {})).save_pretrained(folder)
        return plan.shape_of(Path(folder))


def random_case(seed):
    """Return a model, work and number of GPUs: a kind of every family in turn, and random dimensions for even seeds."""
    chance = random.Random(seed)
    if seed % 2:
        shape = shape_of_kind(list(KINDS)[seed // 2 % len(KINDS)])
        kind = "train" if shape.mixture else chance.choice(["prefill", "decode", "chat", "train"])
        gpus = chance.choice([1, 2, 4, 6, 8, 12])
        return Question(shape, GTT, gpus, WorkSettings(kind, chance.choice([5, 64, 1000]), batch=2))
    kv_heads = chance.choice([1, 2, 3, 4, 6, 8])
    heads = kv_heads * chance.choice([1, 2, 3, 4])
    layers, ffn = chance.choice([2, 3, 4, 6]), chance.choice([48, 64, 84, 90, 96])
    shape = ModelShape(layers, heads * 8, heads, kv_heads, 8, ffn, 257, 4096, 1e-5, True, False)
    gpus = chance.choice([1, 2, 3, 4, 6, 8, 12, 16, 24])
    work = WorkSettings(chance.choice(["prefill", "decode", "chat", "train"]), chance.choice([5, 64, 1000]), batch=2)
    return Question(shape, GTT, gpus, work)


def test_meshes_of_200_random_models_agree_with_the_recipes_checks(monkeypatch, tmp_path):
    """`resolve_target`, which every recipe calls, refuses the same meshes as plans do, for the same reasons."""
    monkeypatch.setattr(target, "locate", lambda *_: tmp_path)
    refused, taken = 0, []
    assert {config.model_type for config in KINDS.values()} == set(FAMILIES), "a kind of every family"
    for seed in range(200):
        question = random_case(seed)
        monkeypatch.setattr(target, "shape_of", lambda _, shape=question.shape: shape)
        trains = question.work.kind == "train"
        meshes = list(meshes_of(question.gpus, trains=trains, experts=question.experts))
        for mesh in random.Random(seed).sample(meshes, min(2, len(meshes))):
            values = {"mesh": vars(mesh), "model": {"name": "tiny", "source": "x"}, "run": {"threads": 1}}
            reason = refusal_of(question, mesh)
            of_training = ("work.", "mesh.pp", "mesh.ulysses x mesh.ring")  # `prepare` of a recipe says so later
            if reason and not (reason.startswith(of_training) or "all layers of a pipeline stage are dense" in reason):
                with pytest.raises(ValueError, match=re.escape(reason)):
                    target.resolve_target(OmegaConf.create(values), "recipes.generate", needs_weights=False)
                refused += 1
            else:
                target.resolve_target(OmegaConf.create(values), "recipes.generate", needs_weights=False)
                taken.append((mesh, question.shape))
    assert refused > 80
    assert any(mesh.ep > 1 for mesh, _ in taken) and any(set(shape.windows) - {None} for _, shape in taken)


@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(ulysses=9), Mesh(tp=9), Mesh(ulysses=2), Mesh(ring=5, tp=3)])
def test_generate_takes_the_planned_meshes_of_a_real_folder(prepared, tiny, mesh):
    question = Question(plan.shape_of(tiny), GTT, mesh.ranks, WorkSettings("prefill", 9))
    words = [f"mesh.{axis}={ranks}" for axis, ranks in vars(mesh).items()]
    try:
        prepared(*words, "prompt.text=The river")
        reason = None
    except ValueError as error:
        reason = str(error)
    assert refusal_of(question, mesh) == reason


@pytest.mark.parametrize("words", [("mesh.pp=2",), ("mesh.pp=3",), ("mesh.dp=3",), ("mesh.tp=2", "mesh.ring=3")])
def test_pretrain_takes_the_planned_meshes(config_of, tmp_path, words):
    (tmp_path / "text.txt").write_text("a b c d e f g " * 200)
    data = ("data=text", f"data.sources=[{{path:{tmp_path}/text.txt}}]", "data.length=64", "data.batch=2")
    config = config_of("pretrain", *data, "evaluate.every=0", f"out={tmp_path}/run", *words)
    shape = shape_named("tiny")
    mesh = Mesh(**{word.partition("=")[0].removeprefix("mesh."): int(word.partition("=")[2]) for word in words})
    reason = refusal_of(Question(shape, GTT, mesh.ranks, WorkSettings("train", 64, batch=2)), mesh)
    if reason is None:
        assert pretrain.prepare(config).target.mesh == mesh
    else:
        with pytest.raises(ValueError, match=r"use") as error:
            pretrain.prepare(config)
        # The plan names its own settings.
        assert str(error.value).replace("data.batch", "work.batch").replace("data.length", "work.context") == reason
