"""Chunked cross-entropy on threads equals torch's dense float64 loss, and makes no tensor larger than a chunk."""

import pytest
import torch

from longctx.parallel.cross_entropy import ALLOCATORS, cross_entropy
from longctx.parallel.measure.memory import MemoryMeter
from longctx.parallel.threads import run_threads

N, HIDDEN = 43, 7


def problem(vocab: int):
    """Hidden states, weight, targets and counts, a fifth of which are 0; the factor of the loss is not 1."""
    draw = torch.Generator().manual_seed(vocab)
    hidden, weight = (3 * torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64) for n in (N, vocab))
    counts = (torch.rand(N, generator=draw) < 0.8).double()
    return hidden, weight, torch.randint(vocab, (N,), generator=draw), counts


def dense(vocab: int, scale: float):
    hidden, weight, targets, counts = problem(vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    losses = torch.nn.functional.cross_entropy(scale * hidden @ weight.T, targets, reduction="none")
    (3 * (losses * counts).sum()).backward()
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 5, 43, 100, None])
@pytest.mark.parametrize(("vocab", "tp", "scale"), [(31, 1, 1.0), (31, 2, 0.3), (31, 3, 1.0), (5, 4, 1.7)])
def test_losses_and_gradients_are_those_of_dense_float64(rows, vocab, tp, scale):
    """With 5 tokens on 4 ranks, the last rank has padding only."""
    shard = -(-vocab // tp)

    def on_rank(world, rank):
        hidden, weight, targets, counts = problem(vocab)
        mine = torch.cat([weight, weight.new_full((tp * shard - vocab, HIDDEN), 5.0)])[rank * shard :][:shard].clone()
        hidden.requires_grad_(), mine.requires_grad_()
        total, losses = cross_entropy(hidden, mine, targets, counts, world.group(rank), vocab, scale=scale, rows=rows)
        (3 * total).backward()
        torch.testing.assert_close(total, (losses * counts).sum(), rtol=1e-12, atol=0)
        return losses, hidden.grad, mine.grad

    each = run_threads(tp, on_rank)
    losses, d_hidden, d_weight = dense(vocab, scale)
    for got, *_ in each:
        torch.testing.assert_close(got, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(d for _, d, _ in each), d_hidden, rtol=1e-12, atol=1e-12)
    whole = torch.cat([d for *_, d in each])
    torch.testing.assert_close(whole[:vocab], d_weight, rtol=1e-12, atol=1e-12)
    assert not whole[vocab:].any()


def test_bfloat16_weight_gradient_is_summed_in_float32():
    """A sum of hundreds of equal contributions would stop growing in bfloat16."""
    n, vocab = 601, 11
    hidden, weight = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(vocab, 1, dtype=torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    targets, world = torch.zeros(n, dtype=torch.long), run_threads(1, lambda world, rank: world.group(rank))[0]
    total, _ = cross_entropy(hidden, weight, targets, torch.ones(n), world, vocab, rows=1)
    total.backward()
    assert weight.grad[0].item() == pytest.approx(n * (1 / vocab - 1), rel=2**-8)


@pytest.mark.parametrize("rows", [10, None])
def test_logits_of_one_chunk_exist_at_a_time(rows):
    n, vocab = 997, 2111
    hidden, weight = torch.randn(n, 3, requires_grad=True), torch.randn(vocab, 3, requires_grad=True)
    world = run_threads(1, lambda world, rank: world.group(rank))[0]
    with MemoryMeter({"logits": ALLOCATORS}) as meter:
        total, _ = cross_entropy(hidden, weight, torch.arange(n) % vocab, torch.ones(n), world, vocab, rows=rows)
        total.backward()
    # The chunk and both gradients in float32, and some numbers for each row; a second chunk would be 84 KB or more.
    of_rows = meter.peak["logits"] - 4 * ((rows or n) * vocab + vocab * 3 + n * 3)
    assert 0 < of_rows < 16 * n + 100 * (rows or n)
