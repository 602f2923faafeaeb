"""Loss and gradient of any mesh are one rank's, and those of transformers in float64, document by document."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.parallel.launch import run_ranks
from longctx.schema import Mesh, Optim
from tests.tiny import tiny_model
from tests.train.ranks import Run, sequences, train

# Four packed sequences of 37 tokens: ragged documents, one alone, one of single tokens, an empty one.
LENGTHS = ((13, 0, 22, 2), (37,), (5, 11, 20, 1), (1, 1, 1, 34))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("train") / "tiny", positions=97, heads=8, kv_heads=4, ffn=52)


@pytest.fixture(scope="module")
def run(model: Path) -> Run:
    return Run(Mesh(), model, LENGTHS, steps=2)


def exact(run: Run) -> tuple[float, float]:
    """Token-weighted mean loss of the first step's sequences, and the norm of its gradient."""
    from transformers import AutoModelForCausalLM

    net, batch, total = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float64), sequences(run, 0), 0.0
    for tokens, targets, mask, lengths in zip(batch.tokens, batch.targets, batch.mask, batch.lengths, strict=True):
        pieces = zip(*(x.split(list(lengths)) for x in (tokens, targets, mask)), strict=True)
        for ids, wanted, counts in pieces:
            if counts.any():
                losses = torch.nn.functional.cross_entropy(net(ids[None]).logits[0], wanted, reduction="none")
                total = total + (losses * counts).sum()
    loss = total / batch.mask.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    return float(loss.detach()), float(norm)


def assert_steps_are(run: Run, others: list[tuple[float, float, int]]) -> None:
    """Loss and norm of the gradient to 1e-6, step by step, on the first rank and on the last."""
    ranks = run_ranks(run.mesh.ranks, train, run)
    for got in (ranks[0], ranks[-1]):
        for (loss, norm, tokens), (right, right_norm, all_tokens) in zip(got, others, strict=True):
            assert tokens == all_tokens
            assert loss == pytest.approx(right, rel=1e-6)
            assert norm == pytest.approx(right_norm, rel=1e-6)


@pytest.fixture(scope="module")
def one_rank(run: Run) -> list[tuple[float, float, int]]:
    return run_ranks(1, train, run)[0]


@pytest.mark.parametrize("masked", ["ends", "a rank's"])
def test_one_rank_is_transformers(run, masked):
    run = replace(run, masked=masked, steps=1)
    ((loss, norm, tokens),) = run_ranks(1, train, run)[0]
    right, right_norm = exact(run)
    assert tokens == sequences(run, 0).counted
    assert loss == pytest.approx(right, rel=1e-6)
    assert norm == pytest.approx(right_norm, rel=1e-6)


MESHES = [
    (Mesh(tp=2), {}),
    (Mesh(ulysses=2), {}),
    (Mesh(ring=2), {"strategy": "pass_q", "layout": "striped"}),
    (Mesh(dp=2), {"optim": Optim(zero1=True)}),
    (Mesh(pp=2), {}),
    (Mesh(ulysses=2, ring=2), {"recompute": "selective"}),
    (Mesh(tp=2, ring=2), {"optim": Optim(zero1=True)}),
    (Mesh(tp=2, dp=2), {}),
    (Mesh(tp=2, pp=2), {}),
    (Mesh(tp=2, ulysses=2), {}),
    (Mesh(ring=2, dp=2), {"recompute": "full"}),
    (Mesh(ring=2, pp=2), {"recompute": "full"}),
    (Mesh(ulysses=2, dp=2), {}),
    (Mesh(ulysses=2, pp=2), {}),
    (Mesh(dp=2, pp=2), {}),
    (Mesh(ring=3), {"strategy": "all_gather_kv", "layout": "contiguous"}),
]


@pytest.mark.parametrize(("mesh", "how"), MESHES, ids=str)
def test_every_mesh_is_one_rank(run, one_rank, mesh, how):
    """Two steps: the second has been changed by the first's gradients, whoever had them."""
    assert_steps_are(replace(run, mesh=mesh, **how), one_rank)


@pytest.mark.parametrize("mesh", [Mesh(ring=2), Mesh(dp=2), Mesh(ulysses=2, dp=2)], ids=str)
def test_a_sequence_in_which_nothing_counts_changes_nothing(run, mesh):
    """With dp=2 it is all that one rank has."""
    masked = replace(run, masked="a rank's")
    assert_steps_are(replace(masked, mesh=mesh), run_ranks(1, train, masked)[0])


def test_bfloat16_with_float32_masters_follows(run, one_rank):
    for mesh in (Mesh(), Mesh(ring=2), Mesh(tp=2, dp=2)):
        got = run_ranks(mesh.ranks, train, replace(run, mesh=mesh, dtype="bfloat16"))[0]
        for (loss, norm, _), (right, right_norm, _) in zip(got, one_rank, strict=True):
            assert loss == pytest.approx(right, rel=1e-3)
            assert norm == pytest.approx(right_norm, rel=2e-2)
