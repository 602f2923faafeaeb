"""Every kind of model: loss and gradients of a training step equal those of transformers, on several meshes."""

from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config import Mesh
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
    return {kind: Run(Mesh(), folder / kind, LENGTHS, tokens=SMALL["vocab_size"], mlp_rows=53) for kind in KINDS}


@pytest.mark.parametrize("mesh", [Mesh(tp=2, ring=2), Mesh(ulysses=2, pp=2)], ids=str)
def test_gradients_equal_those_of_transformers(mesh: Mesh, runs: dict[str, Run], tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in runs}
    run_ranks(mesh.ranks, train_each, [replace(runs[kind], mesh=mesh, gradients=folders[kind]) for kind in runs])
    for kind, run in runs.items():
        _, right = exact(run)
        got = tensors(folders[kind])
        for name, gradient in right.items():
            assert (got[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), (kind, name)
