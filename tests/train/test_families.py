"""Every kind of model: loss and gradients of a training step equal those of transformers, on several meshes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.config import Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import KINDS, SMALL, random_model
from tests.tiny import tiny_tokenizer
from tests.train.ranks import Run, train_each
from tests.train.test_step import exact_model, tensors

# Documents longer than the windows, and than the original context of LongRoPE's long factors.
LENGTHS = ((131, 139), (270,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        random_model(kind, folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
    return {kind: Run(Mesh(), folder / kind, LENGTHS, tokens=SMALL["vocab_size"], mlp_rows=53) for kind in KINDS}


def exact_gradients(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients by the names of transformers' files, which differ from those of its parameters for experts."""
    _, net = exact_model(run)
    for parameter in net.parameters():
        parameter.data = parameter.grad
    net.save_pretrained(folder)
    return tensors(folder)


@pytest.mark.parametrize("mesh", [Mesh(tp=2, ring=2), Mesh(ulysses=2, pp=2)], ids=str)
def test_gradients_equal_those_of_transformers(mesh: Mesh, runs: dict[str, Run], tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in runs}
    run_ranks(mesh.ranks, train_each, [replace(runs[kind], mesh=mesh, gradients=folders[kind]) for kind in runs])
    for kind, run in runs.items():
        right, got = exact_gradients(run, tmp_path / f"{kind}, transformers"), tensors(folders[kind])
        assert set(got) == set(right)
        for name, gradient in right.items():
            assert (got[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), (kind, name)


def test_runs_resume_on_another_mesh(runs: dict[str, Run], tmp_path: Path) -> None:
    """Models with parameters of our own: sinks, norms sharded over ranks, experts on some layers only."""
    kinds = ("qwen3_moe, and a layer without experts", "gpt_oss", "olmo2")
    settings = {"steps": 2, "optim": Optim(zero1=True)}
    begin = [replace(runs[kind], mesh=Mesh(tp=2), checkpoints=tmp_path / kind, **settings) for kind in kinds]
    whole = run_ranks(2, train_each, [replace(run, save_at=1) for run in begin])[0]
    resumed = run_ranks(2, train_each, [replace(run, mesh=Mesh(dp=2), begin=1) for run in begin])[0]
    for (_, expected), (got,) in zip(whole, resumed, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        assert got.norm == pytest.approx(expected.norm, rel=1e-6)
