"""Loss and gradients of a training step equal transformers', for every kind of model, on every axis of a mesh.

The models have no pad_token_id, which changes transformers' gradient (see the test of it).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config import Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import KINDS, SMALL, random_model
from tests.tiny import tiny_tokenizer
from tests.train.against_transformers import assert_step_equals, assert_steps_equal, exact
from tests.train.ranks import Run, train_each

# Documents longer than the windows, and than the original context of LongRoPE's long factors.
LENGTHS = ((131, 139), (270,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        random_model(kind, folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
    return {kind: Run(Mesh(), folder / kind, LENGTHS, tokens=SMALL["vocab_size"], mlp_rows=53) for kind in KINDS}


@pytest.fixture(scope="module")
def right(
    runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("right")
    return {kind: exact(run, folder / kind) for kind, run in runs.items()}


MESHES: list[tuple[Mesh, dict[str, Any]]] = [
    (Mesh(tp=2, ring=2), {"strategy": "pass_q", "layout": "striped", "offload": True}),
    (Mesh(ulysses=2, pp=2), {"recompute": "full"}),
]


@pytest.mark.parametrize(("mesh", "settings"), MESHES, ids=str)
def test_loss_and_every_gradient_equal_those_of_transformers_in_float64(
    mesh: Mesh, settings: dict[str, Any], runs: dict[str, Run], right: Any, tmp_path: Path
) -> None:
    assert_steps_equal(mesh, settings, runs, right, tmp_path)


@pytest.mark.parametrize("kind", ["untied llama", "tied llama"])
def test_gradient_differs_from_transformers_only_in_the_pad_token_s_row(
    kind: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    """transformers does not train the input embedding of pad_token_id; longctx trains it as any other token's."""
    pad, embedding = 5, "model.embed_tokens.weight"
    run = replace(runs[kind], folder=random_model(kind, tmp_path / "model", pad_token_id=pad))
    plain, padded = exact(runs[kind], tmp_path / "plain"), exact(run, tmp_path / "padded")
    job = replace(run, gradients=tmp_path / "ours", dtype="float64")
    (step,) = run_ranks(1, train_each, [job])[0][0]
    assert_step_equals(step, tmp_path / "ours", plain, "with pad_token_id, longctx; without, transformers")
    others = torch.arange(SMALL["vocab_size"]) != pad
    assert padded[0] == plain[0] and padded[1].keys() == plain[1].keys()
    for name, gradient in padded[1].items():
        rows_but_pad = others if name == embedding else slice(None)
        expected = plain[1][name][rows_but_pad]
        assert (gradient[rows_but_pad] - expected).norm() <= 1e-11 * expected.norm(), name
    assert not torch.allclose(padded[1][embedding][pad], plain[1][embedding][pad], rtol=0.1)
    assert kind == "tied llama" or not padded[1][embedding][pad].any()


def test_step_on_data_parallel_ranks(runs: dict[str, Run], right: Any) -> None:
    """For the gradient norm, megatron-core must know which gradients are sharded over tensor-parallel ranks."""
    mesh = Mesh(tp=2, dp=2)
    jobs = [replace(run, mesh=mesh, optim=Optim(zero1=True), recompute="selective") for run in runs.values()]
    for (kind, (loss, gradients)), (step,) in zip(right.items(), run_ranks(4, train_each, jobs)[0], strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-6), kind
        assert step.norm == pytest.approx(float(torch.stack([x.norm() for x in gradients.values()]).norm()), rel=1e-5)


def test_runs_resume_on_another_mesh(runs: dict[str, Run], tmp_path: Path) -> None:
    """The models have parameters that megatron-core lacks: sinks, sharded norms, experts on some layers only."""
    kinds = ("qwen3_moe, and a layer without experts", "gpt_oss", "olmo2")
    settings = {"steps": 2, "optim": Optim(zero1=True)}
    begin = [replace(runs[kind], mesh=Mesh(tp=2), checkpoints=tmp_path / kind, **settings) for kind in kinds]
    whole = run_ranks(2, train_each, [replace(run, save_at=1) for run in begin])[0]
    resumed = run_ranks(2, train_each, [replace(run, mesh=Mesh(dp=2), begin=1) for run in begin])[0]
    for (_, expected), (got,) in zip(whole, resumed, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        assert got.norm == pytest.approx(expected.norm, rel=1e-6)
