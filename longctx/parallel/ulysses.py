"""Ulysses: trade sequence for heads with one all-to-all, so that attention sees whole rows of fewer heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Keys, Queries, Tensor

Attention = Callable[[Queries, Keys, Keys], Queries]


def over_heads(ulysses: Comm, rows: Sequence[int], inner: Attention) -> Attention:
    """``inner`` attention over this group's rows together, each rank doing its share of the heads.

    Where there are fewer KV heads than ranks, each goes to as many ranks as share it.

    ``rows[u]`` are the sequence rows that member u of the group holds; ``inner`` sees those of all members,
    in turn, with hq / size query heads and hk / size KV heads (at least one).  Differentiable.  A group of one adds
    nothing.  Source: arXiv 2405.07719, section 3.

    Raises ValueError where the group does not divide the heads.
    """
    if ulysses.size == 1:
        return inner

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        refuse_uneven_heads(q.shape[2], k.shape[2], ulysses.size)
        k, v = (for_every_member(x, ulysses.size) for x in (k, v))
        # One message to each member: its query heads, its keys' and its values'.
        shares = zip(*(x.chunk(ulysses.size, 2) for x in (q, k, v)), strict=True)
        packed = torch.cat([part for share in shares for part in share], 2)
        whole = _RowsForHeads.apply(packed, ulysses, tuple(rows))
        heads = [x.shape[2] // ulysses.size for x in (q, k, v)]
        return _HeadsForRows.apply(inner(*whole.split(heads, 2)), ulysses, tuple(rows))

    return attention


def refuse_uneven_heads(heads: int, kv_heads: int, degree: int) -> None:
    """ValueError, with the degrees that do work, unless ``degree`` members can share the heads.

    It must divide the query heads, and either divide the KV heads or be a multiple of them.
    """

    def fits(n: int) -> bool:
        return heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

    if not fits(degree):
        fit = [n for n in range(1, heads + 1) if fits(n)]
        nearest = min(fit, key=lambda n: (abs(n - degree), n))
        raise ValueError(
            f"mesh.ulysses={degree} cannot share {heads} query heads and {kv_heads} KV heads evenly: "
            f"use mesh.ulysses={nearest} (possible: {', '.join(map(str, fit))}), and mesh.ring for the rest"
        )


def for_every_member(x: Keys, degree: int) -> Tensor:
    """``x`` with each KV head repeated, if there are fewer than ``degree``, so that every member gets one."""
    return x.repeat_interleave(degree // x.shape[2], 2) if x.shape[2] < degree else x


def share_of_heads(x: Tensor, degree: int, member: int) -> Tensor:
    """The heads (dim 2) of ``x`` that ``member`` of ``degree`` attends to."""
    return for_every_member(x, degree).chunk(degree, 2)[member]


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
