"""Ulysses: trade sequence for heads with one all-to-all, so that attention sees whole rows of fewer heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Keys, Queries, Tensor

Attention = Callable[[Queries, Keys, Keys], Queries]


def over_heads(ulysses: Comm, rows: Sequence[int], inner: Attention) -> Attention:
    """``inner`` attention over this group's rows together, each rank doing its share of the heads.

    ``rows[u]`` are the sequence rows that member u of the group holds; ``inner`` sees those of all members,
    in turn, with hq / size query heads and hk / size KV heads.  Differentiable.  A group of one adds
    nothing.  Source: arXiv 2405.07719, section 3.

    Raises ValueError where the group does not divide the heads.
    """
    if ulysses.size == 1:
        return inner

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        refuse_uneven_heads(q.shape[2], k.shape[2], ulysses.size)
        # One message to each member: its query heads, its keys' and its values'.
        shares = zip(*(x.chunk(ulysses.size, 2) for x in (q, k, v)), strict=True)
        packed = torch.cat([part for share in shares for part in share], 2)
        whole = _RowsForHeads.apply(packed, ulysses, tuple(rows))
        heads = [x.shape[2] // ulysses.size for x in (q, k, v)]
        return _HeadsForRows.apply(inner(*whole.split(heads, 2)), ulysses, tuple(rows))

    return attention


def refuse_uneven_heads(heads: int, kv_heads: int, degree: int) -> None:
    """ValueError, with the degrees that do work, unless ``degree`` divides both head counts."""
    if heads % degree or kv_heads % degree:
        fit = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
        nearest = min(fit, key=lambda n: (abs(n - degree), n))
        raise ValueError(
            f"mesh.ulysses={degree} does not divide {heads} query heads and {kv_heads} KV heads: "
            f"use mesh.ulysses={nearest} (possible: {', '.join(map(str, fit))}), and mesh.ring for the rest"
        )


def _gather_rows(x: Tensor, comm: Comm, rows: Sequence[int]) -> Tensor:
    """[b s h d] of this member's rows -> [b sum(rows) h/size d]."""
    parts = list(x.chunk(comm.size, 2))
    shape = (x.shape[0], x.shape[2] // comm.size, x.shape[3])
    return torch.cat(comm.all_to_all(parts, [(shape[0], n, *shape[1:]) for n in rows]), 1)


def _scatter_rows(x: Tensor, comm: Comm, rows: Sequence[int]) -> Tensor:
    """[b sum(rows) h/size d] -> [b s h d] of this member's rows: the inverse of `_gather_rows`."""
    parts = list(x.split(list(rows), 1))
    mine = (x.shape[0], rows[comm.rank], *x.shape[2:])
    return torch.cat(comm.all_to_all(parts, [mine] * comm.size), 2)


class _RowsForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, rows: tuple[int, ...]) -> Tensor:
        ctx.comm, ctx.rows = comm, rows
        return _gather_rows(x, comm, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_rows(grad, ctx.comm, ctx.rows), None, None


class _HeadsForRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, rows: tuple[int, ...]) -> Tensor:
        ctx.comm, ctx.rows = comm, rows
        return _scatter_rows(x, comm, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather_rows(grad, ctx.comm, ctx.rows), None, None
