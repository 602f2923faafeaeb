"""An attention problem that is sharded over ranks: packed tensors, each rank's rows, and the oracle's result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.layout import Layout
from longctx.parallel.comm import Comm, Traffic
from longctx.parallel.threads import run_threads
from longctx.parallel.ulysses import Attention
from tests import oracle

B = 2


@dataclass(frozen=True)
class Problem:
    """Packed tensors [b s h d]: ``queries`` is the layout of q and dout, ``keys`` of k and v."""

    queries: Layout
    keys: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def of(self, rank: int) -> list[Tensor]:
        """Return q, k, v and dout of a rank's rows; q, k and v require gradients."""
        sharded = zip(
            (self.q, self.k, self.v, self.dout), (self.queries, self.keys, self.keys, self.queries), strict=True
        )
        q, k, v, dout = (layout.shard(x, rank, dim=1) for x, layout in sharded)
        return [*(x.requires_grad_() for x in (q, k, v)), dout]

    def exact(self) -> tuple[Tensor, ...]:
        """Return the oracle's packed out, dq, dk and dv."""
        mask = oracle.visible(
            oracle.pack_rows(self.queries.lengths, self.queries.begins), oracle.pack_rows(self.keys.lengths)
        )
        out, _ = oracle.attention(self.q, self.k, self.v, mask)
        return out, *oracle.gradients(self.q, self.k, self.v, mask, self.dout)

    def assert_solved(self, results: Sequence[Sequence[Tensor]], tolerance: float) -> None:
        """Assert that ``results[rank]``, a rank's rows of out, dq, dk and dv, are the oracle's."""
        layouts = (self.queries, self.queries, self.keys, self.keys)
        for parts, layout, exact in zip(zip(*results, strict=True), layouts, self.exact(), strict=True):
            oracle.assert_close(layout.unshard(parts, dim=1), exact, tolerance)


def problem(
    queries: Layout, keys: Layout | None = None, heads=(6, 2), d: int = 5, dtype: torch.dtype = torch.float64
) -> Problem:
    """Return a random problem; ranks that are threads build the same one."""
    generator = torch.Generator().manual_seed(0)  # not the global one, which threads share
    keys = keys or queries
    (hq, hk), sq, sk = heads, queries.total, keys.total
    shapes = ((B, sq, hq, d), (B, sk, hk, d), (B, sk, hk, d), (B, sq, hq, d))
    packed = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return Problem(queries, keys, *packed)


def solve(
    attention: Attention, problem: Problem, rank: int, traffic: Callable[[], Traffic]
) -> tuple[list[Tensor], list[Traffic]]:
    """Return this rank's rows of out, dq, dk and dv, and the traffic after the forward and after the backward."""
    q, k, v, dout = problem.of(rank)
    out = attention(q, k, v)
    forward = Traffic(dict(traffic().bytes), dict(traffic().messages))
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad], [forward, traffic()]


def on_threads(
    problem: Problem, attention_on: Callable[[Comm], Attention]
) -> tuple[list[list[Tensor]], list[list[Traffic]]]:
    """Run `solve` on one thread per rank; return the results and the traffic, by rank."""

    def rank_main(world, rank):
        comm = world.group(rank)
        return solve(attention_on(comm), problem, rank, lambda: comm.traffic)

    results, traffic = zip(*run_threads(problem.queries.size, rank_main), strict=True)
    return list(results), list(traffic)
