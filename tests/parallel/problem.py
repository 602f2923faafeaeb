"""A problem that ranks share: packed tensors, each rank's rows of them, and the oracle's answer."""

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
    """q and dout packed by ``queries``, k and v by ``keys``."""

    queries: Layout
    keys: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def of(self, rank: int) -> list[Tensor]:
        """q, k, v, dout of a rank's rows; the first three want gradients."""
        sharded = zip(
            (self.q, self.k, self.v, self.dout), (self.queries, self.keys, self.keys, self.queries), strict=True
        )
        q, k, v, dout = (layout.shard(x, rank, dim=1) for x, layout in sharded)
        return [*(x.requires_grad_() for x in (q, k, v)), dout]

    def exact(self) -> tuple[Tensor, ...]:
        """out, dq, dk, dv."""
        mask = oracle.visible(
            oracle.pack_rows(self.queries.lengths, self.queries.begins), oracle.pack_rows(self.keys.lengths)
        )
        out, _ = oracle.attention(self.q, self.k, self.v, mask)
        return out, *oracle.gradients(self.q, self.k, self.v, mask, self.dout)

    def assert_solved(self, results: Sequence[Sequence[Tensor]], tolerance: float) -> None:
        """``results[rank]`` are its rows of out, dq, dk and dv."""
        layouts = (self.queries, self.queries, self.keys, self.keys)
        for parts, layout, right in zip(zip(*results, strict=True), layouts, self.exact(), strict=True):
            oracle.assert_close(layout.unshard(parts, dim=1), right, tolerance)


def problem(
    queries: Layout, keys: Layout | None = None, heads=(6, 2), d: int = 5, dtype: torch.dtype = torch.float64
) -> Problem:
    generator = torch.Generator().manual_seed(0)  # its own: threads that are ranks may build the same problem
    keys = keys or queries
    (hq, hk), sq, sk = heads, queries.total, keys.total
    shapes = ((B, sq, hq, d), (B, sk, hk, d), (B, sk, hk, d), (B, sq, hq, d))
    packed = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return Problem(queries, keys, *packed)


def solve(
    attention: Attention, problem: Problem, rank: int, traffic: Callable[[], Traffic]
) -> tuple[list[Tensor], list[Traffic]]:
    """Out and gradients of this rank's rows; and what was sent until the end of the forward, and of all."""
    q, k, v, dout = problem.of(rank)
    out = attention(q, k, v)
    forward = Traffic(dict(traffic().bytes), dict(traffic().messages))
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad], [forward, traffic()]


def on_threads(
    problem: Problem, attention_on: Callable[[Comm], Attention]
) -> tuple[list[list[Tensor]], list[list[Traffic]]]:
    """`solve` on a thread for each rank: the answers and the traffic, by rank."""

    def rank_main(world, rank):
        comm = world.group(rank)
        return solve(attention_on(comm), problem, rank, lambda: comm.traffic)

    answers, traffic = zip(*run_threads(problem.queries.size, rank_main), strict=True)
    return list(answers), list(traffic)
