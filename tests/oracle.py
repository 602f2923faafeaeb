"""Dense attention in float64, written from positions and document ids: what all others are held to.

It shares no code with longctx.  The mask is a boolean matrix of all queries by all keys, KV heads are copied
for the query heads that share them, and gradients are autograd's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Of each row, its position in its document and which document that is."""

    positions: Tensor
    documents: Tensor

    def __getitem__(self, index: Tensor) -> "Rows":
        return Rows(self.positions[index], self.documents[index])


def packed(lengths: Sequence[int], begins: Sequence[int] | None = None) -> Rows:
    """The rows of whole documents, one behind the other; document i begins at position ``begins[i]``."""
    begins = begins or [0] * len(lengths)
    positions = [begin + row for begin, n in zip(begins, lengths, strict=True) for row in range(n)]
    documents = [i for i, n in enumerate(lengths) for _ in range(n)]
    return Rows(torch.tensor(positions, dtype=torch.long), torch.tensor(documents, dtype=torch.long))


def visible(q: Rows, k: Rows, before: int | None = None, after: int | None = 0) -> Tensor:
    """Bool [sq, sk]: a query sees the keys of its own document, from ``before`` behind it to ``after`` ahead of it."""
    seen = q.documents[:, None] == k.documents[None, :]
    ahead = k.positions[None, :] - q.positions[:, None]
    if before is not None:
        seen = seen & (ahead >= -before)
    if after is not None:
        seen = seen & (ahead <= after)
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out [b sq hq d], lse [b sq hq]) in float64 of q [b sq hq d], k and v [b sk hk d], mask [sq, sk]."""
    q, k, v = q.double(), k.double(), v.double()
    sharing = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(sharing, 2), v.repeat_interleave(sharing, 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[None, :, None, :], -math.inf)
    out = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = attention(*leaves, mask)
    return torch.autograd.grad(out, leaves, dout.double())


def assert_close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    """The norm of the difference is at most ``tolerance`` of the exact norm.

    Of 1, where that is less: inputs are of unit scale.  A gradient that is 0 throughout (of rows that see one key
    only) is what is left when terms of unit scale cancel, an element each: there it is of the norm of those.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    cancelled = 0.0 if exact.any() else exact.numel() ** 0.5
    allowed = tolerance * max(exact.norm().item(), cancelled, 1.0)
    error = (got.double() - exact).norm().item()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"  # also if error is NaN
