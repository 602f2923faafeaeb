"""Ulysses attention: an all-to-all exchanges sequence shards for head shards before attention, and back after it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Keys, Queries, Tensor

Attention = Callable[[Queries, Keys, Keys], Queries]


def over_heads(ulysses: Comm, rows: Sequence[int], inner: Attention) -> Attention:
    """Return differentiable attention over the rows of the whole Ulysses group (arXiv 2405.07719, section 3).

    Example: 2 members with 3 and 5 rows, 4 query heads and 2 KV heads.  Each member calls ``inner`` with all 8 rows of
    2 query heads and 1 KV head, and gets back the output of its own rows with all 4 heads.

    ``rows[u]`` is the number of rows of member u; ``inner`` receives the members' rows in rank order.  With fewer KV
    heads than members, each KV head goes to all the members that share it.  A group of one returns ``inner``.

    The returned function raises ValueError if the group's size does not fit the heads (`refuse_uneven_heads`).
    """
    if ulysses.size == 1:
        return inner

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        refuse_uneven_heads(q.shape[2], k.shape[2], ulysses.size)
        k, v = (repeat_kv_heads(x, ulysses.size) for x in (k, v))
        # Each member's query, key and value heads travel together, in one message to it.
        shares = zip(*(x.chunk(ulysses.size, 2) for x in (q, k, v)), strict=True)
        packed = torch.cat([heads for share in shares for heads in share], 2)
        all_rows = _GatherRows.apply(packed, ulysses, tuple(rows))  # type: ignore[no-untyped-call]
        heads_per_member = [x.shape[2] // ulysses.size for x in (q, k, v)]
        out: Tensor = _ScatterRows.apply(inner(*all_rows.split(heads_per_member, 2)), ulysses, tuple(rows))  # type: ignore[no-untyped-call]
        return out

    return attention


def refuse_uneven_heads(heads: int, kv_heads: int, degree: int) -> None:
    """Raise ValueError, naming the degrees that fit, unless ``degree`` Ulysses ranks can share the heads.

    ``degree`` must divide the query heads, and must divide the KV heads or be a multiple of them.
    """

    def fits(n: int) -> bool:
        return heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

    if not fits(degree):
        fit = [n for n in range(1, heads + 1) if fits(n)]
        nearest = min(fit, key=lambda n: (abs(n - degree), n))
        raise ValueError(
            f"mesh.ulysses={degree} cannot share {heads} query heads and {kv_heads} KV heads evenly; "
            f"use mesh.ulysses={nearest} (possible: {', '.join(map(str, fit))}), and mesh.ring for the other ranks"
        )


def repeat_kv_heads(x: Keys, degree: int) -> Tensor:
    """Return keys or values ``x`` with at least ``degree`` heads: fewer KV heads are repeated up to that number."""
    return x.repeat_interleave(degree // x.shape[2], 2) if x.shape[2] < degree else x


def share_of_heads(x: Keys, degree: int, member: int) -> Tensor:
    """Return the heads of ``x`` (queries, keys or values) that Ulysses rank ``member`` of ``degree`` ranks computes."""
    return repeat_kv_heads(x, degree).chunk(degree, 2)[member]


def _gather_rows(x: Tensor, comm: Comm, rows: Sequence[int]) -> Tensor:
    """Exchange this member's rows of all heads, [b s h d], for all rows of its heads, [b sum(rows) h/size d]."""
    parts = list(x.chunk(comm.size, 2))
    shape = (x.shape[0], x.shape[2] // comm.size, x.shape[3])
    return torch.cat(comm.all_to_all(parts, [(shape[0], n, *shape[1:]) for n in rows]), 1)


def _scatter_rows(x: Tensor, comm: Comm, rows: Sequence[int]) -> Tensor:
    """Invert `_gather_rows`: [b sum(rows) h/size d] of this member's heads -> [b s h d] of its rows."""
    parts = list(x.split(list(rows), 1))
    mine = (x.shape[0], rows[comm.rank], *x.shape[2:])
    return torch.cat(comm.all_to_all(parts, [mine] * comm.size), 2)


class _GatherRows(torch.autograd.Function):
    """Autograd node of `_gather_rows`; its backward is `_scatter_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, rows: tuple[int, ...]) -> Tensor:
        ctx.comm, ctx.rows = comm, rows
        return _gather_rows(x, comm, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_rows(grad, ctx.comm, ctx.rows), None, None


class _ScatterRows(torch.autograd.Function):
    """Autograd node of `_scatter_rows`; its backward is `_gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, rows: tuple[int, ...]) -> Tensor:
        ctx.comm, ctx.rows = comm, rows
        return _scatter_rows(x, comm, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather_rows(grad, ctx.comm, ctx.rows), None, None
