"""Every kind of model: loss and gradients of a training step equal those of transformers, on every axis of a mesh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config import Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import KINDS, SMALL, random_model
from tests.tiny import tiny_tokenizer
from tests.train.ranks import Run, train_each
from tests.train.test_step import exact, tensors

# Documents longer than the windows, and than the original context of LongRoPE's long factors.
LENGTHS = ((131, 139), (270,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        random_model(kind, folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
    return {kind: Run(Mesh(), folder / kind, LENGTHS, tokens=SMALL["vocab_size"]) for kind in KINDS}


@pytest.fixture(scope="module")
def right(runs: dict[str, Run]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    return {kind: exact(run) for kind, run in runs.items()}


MESHES: list[tuple[Mesh, dict[str, Any]]] = [
    (Mesh(tp=2, ring=2), {"strategy": "pass_q", "layout": "striped"}),
    (Mesh(ulysses=2, pp=2), {"recompute": "full"}),
]


@pytest.mark.parametrize(("mesh", "settings"), MESHES, ids=str)
def test_loss_and_every_gradient_equal_those_of_transformers_in_float64(
    mesh: Mesh, settings: dict[str, Any], runs: dict[str, Run], right: Any, tmp_path: Path
) -> None:
    folders = {kind: tmp_path / kind for kind in runs}
    jobs = [replace(runs[kind], mesh=mesh, gradients=folders[kind], dtype="float64", **settings) for kind in runs]
    steps = [step for (step,) in run_ranks(mesh.ranks, train_each, jobs)[0]]
    for (kind, (loss, gradients)), step in zip(right.items(), steps, strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-13), kind
        # megatron-core divides by the number of tokens in float32.
        rounding = float(1.0 / torch.tensor(step.tokens)) * step.tokens
        got = tensors(folders[kind])
        assert set(got) == set(gradients), kind
        for name, gradient in gradients.items():
            assert (got[name] / rounding - gradient).norm() <= 1e-11 * gradient.norm(), (kind, name)


def test_step_on_data_parallel_ranks(runs: dict[str, Run], right: Any) -> None:
    """With tensor parallelism, megatron-core must know which gradients each rank has a part of, for their norm."""
    mesh = Mesh(tp=2, dp=2)
    jobs = [replace(run, mesh=mesh, optim=Optim(zero1=True), recompute="selective") for run in runs.values()]
    for (kind, (loss, gradients)), (step,) in zip(right.items(), run_ranks(4, train_each, jobs)[0], strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-6), kind
        assert step.norm == pytest.approx(float(torch.stack([x.norm() for x in gradients.values()]).norm()), rel=1e-5)
