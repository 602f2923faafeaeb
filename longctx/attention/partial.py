"""Partial attention as a value: the attention over some of the keys, and the weight that these keys carry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.shapes import AnyShape, Float, LogSumExp, Queries, Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over a subset of the keys, normalised over this subset alone.

    ``out`` [b s h d] is the weighted mean of the subset's values.  ``lse`` [b s h] is the natural logarithm of the sum
    of ``exp(q.k / sqrt(d))`` over the subset: -inf, with an ``out`` of 0, for a row that sees none of its keys.  Both
    are float64 for float64 inputs and float32 otherwise: partials are sent and merged in this precision.
    """

    out: Queries
    lse: LogSumExp


def accumulation_dtype(x: AnyShape) -> torch.dtype:
    """Return the dtype of softmax state and gradient sums for inputs like ``x``: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_partial(q: Queries) -> Partial:
    """Return the partial attention of ``q`` over no keys: the identity of `merge`."""
    dtype = accumulation_dtype(q)
    return Partial(
        torch.zeros(q.shape, dtype=dtype, device=q.device),
        torch.full(q.shape[:-1], -math.inf, dtype=dtype, device=q.device),
    )


def sink(logits: Float[Tensor, " hq"], like: Partial) -> Partial:
    """Return the partial of attention sinks: for rows of ``like``, one key per head, of value 0 and score ``logits``.

    gpt-oss learns these logits.  `merge` the sink once, on the rank that holds the rows: it takes weight from all
    other keys.
    """
    lse = logits.to(like.lse.dtype).expand(like.lse.shape)
    return Partial(torch.zeros_like(like.out), lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Return the attention over the keys of both ``a`` and ``b``, which must be disjoint sets of keys.

    The merge is associative and commutative, with `empty_partial` as its identity.  Each side has the weight exp(lse -
    lse_max) (arXiv 2411.01783, Eq. 4).  It is exact also for rows that see keys of one side only, or of neither.  The
    form with ``logsigmoid``, common elsewhere, gives NaN for some of these rows.  A row with an lse of -inf has no
    weight, even if a kernel has left NaN or infinity in its out.
    """
    merged = Partial(_without_unseen(a).clone(), a.lse.clone())
    merge_(merged, slice(None), b)
    return merged


def merge_(total: Partial, rows: slice, part: Partial) -> None:
    """`merge` ``part`` into ``rows`` of ``total``, in place.

    Rows of ``total`` that have seen no key must have an out of 0, as in `empty_partial` and in every result of `merge`.
    """
    share, lse = _weigh(total.lse[:, rows], part.lse)
    total.out[:, rows].lerp_(_without_unseen(part), share.unsqueeze(-1))
    total.lse[:, rows] = lse


def merge_all(parts: Sequence[Partial]) -> Partial:
    """Return the merged partial of ``parts``, partials of the same rows, with less overhead than repeated `merge_`."""
    lse = torch.stack([part.lse for part in parts])
    total = lse.logsumexp(0)
    share = torch.exp(lse - total).masked_fill(lse == -math.inf, 0.0)
    out = torch.stack([_without_unseen(part) for part in parts])
    return Partial((out * share.unsqueeze(-1)).sum(0), total)


def concat_rows(parts: Sequence[Partial]) -> Partial:
    """Return the partial of all rows of ``parts``, partials of different rows, concatenated along dim 1."""
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))


def _without_unseen(part: Partial) -> Tensor:
    """Return ``out`` with 0 in the rows whose lse is -inf: a weight of 0 times NaN or infinity would be NaN."""
    unseen = part.lse == -math.inf
    # Checking first is cheaper on a CPU.  On a GPU the check would wait for the kernel.
    if unseen.device.type == "cpu" and not unseen.any():
        return part.out
    return part.out.masked_fill(unseen.unsqueeze(-1), 0.0)


def _weigh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the second of two partials in the merged row, from 0 to 1, and the merged log-sum-exp.

    ``a`` and ``b`` are the log-sum-exps of the first and of the second partial.
    """
    # The sigmoid is 1 if a is -inf, and 0 if b is. If both are, b - a is NaN: the mask makes the share 0.
    share = torch.sigmoid(b - a).masked_fill(b == -math.inf, 0.0)
    return share, torch.logaddexp(a, b)
