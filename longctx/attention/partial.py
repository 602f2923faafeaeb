"""A partial attention is a value: what some of the keys say, and how much weight they carry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.shapes import Float, LogSumExp, Queries, Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over some keys, normalised over those keys alone.

    ``out`` [b s h d] is their weighted mean of values; ``lse`` [b s h] the natural logarithm of the sum of
    ``exp(q.k / sqrt(d))`` over them, -inf where a row has met no key.  Both are float32, or float64 when the
    inputs are: partial results travel and add up in that precision whatever the model's dtype.
    """

    out: Queries
    lse: LogSumExp


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype that softmax state and gradient sums of ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_partial(q: Queries) -> Partial:
    """The partial attention of ``q`` over no keys: the unit of `merge`."""
    dtype = accumulation_dtype(q)
    return Partial(
        torch.zeros(q.shape, dtype=dtype, device=q.device),
        torch.full(q.shape[:-1], -math.inf, dtype=dtype, device=q.device),
    )


def sink(logits: Float[Tensor, " hq"], like: Partial) -> Partial:
    """A key of value 0 that every row sees, scored by its head's logit: attention sinks, as gpt-oss learns them.

    `merge` it once, on the rank whose rows they are: the weight that it draws is taken from all other keys.
    """
    lse = logits.to(like.lse.dtype).expand(like.lse.shape)
    return Partial(torch.zeros_like(like.out), lse)


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over the keys of both; associative, commutative, with `empty_partial` as its unit.

    arXiv 2411.01783, Eq. 4: each side weighs exp(lse - lse_max).  Exact for rows that either side, or
    neither, has seen: peers' ``logsigmoid`` form gives NaN there.
    """
    both = Partial(a.out.clone(), a.lse.clone())
    merge_(both, slice(None), b)
    return both


def merge_(seen: Partial, rows: slice, part: Partial) -> None:
    """`merge` ``part`` into ``rows`` of ``seen``, in place: ``seen`` belongs to the caller's loop."""
    share, lse = _weigh(seen.lse[:, rows], part.lse)
    seen.out[:, rows].lerp_(part.out, share.unsqueeze(-1))
    seen.lse[:, rows] = lse


def concat_rows(parts: Sequence[Partial]) -> Partial:
    """Neighbouring rows as one."""
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))


def _weigh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The share of ``b`` in the merged row, and the merged log-sum-exp."""
    # Of what has seen nothing (b = -inf, or a) the sigmoid is 0 (or 1); of two such, b - a would be NaN.
    share = torch.sigmoid(b - a).masked_fill(b == -math.inf, 0.0)
    return share, torch.logaddexp(a, b)
