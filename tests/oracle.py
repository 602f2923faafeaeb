"""Reference for the tests: dense float64 attention, from positions and document ids.

It shares no code with longctx.  The mask is a boolean matrix of all queries by all keys.  KV heads are copied for
the query heads that share them.  Autograd computes the gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The position of each row in its document, and the index of this document."""

    positions: Tensor
    documents: Tensor

    def __getitem__(self, index: Tensor) -> "Rows":
        return Rows(self.positions[index], self.documents[index])


def pack_rows(lengths: Sequence[int], begins: Sequence[int] | None = None) -> Rows:
    """Return the rows of packed documents, one after the other; document i begins at position ``begins[i]``."""
    begins = begins or [0] * len(lengths)
    positions = [begin + row for begin, n in zip(begins, lengths, strict=True) for row in range(n)]
    documents = [i for i, n in enumerate(lengths) for _ in range(n)]
    return Rows(torch.tensor(positions, dtype=torch.long), torch.tensor(documents, dtype=torch.long))


def visible(q: Rows, k: Rows, before: int | None = None, after: int | None = 0) -> Tensor:
    """Return the bool mask [sq, sk]: a query sees keys of its document up to ``before`` earlier and ``after`` later."""
    mask = q.documents[:, None] == k.documents[None, :]
    ahead = k.positions[None, :] - q.positions[:, None]
    if before is not None:
        mask = mask & (ahead >= -before)
    if after is not None:
        mask = mask & (ahead <= after)
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [b sq hq d] and lse [b sq hq] in float64, for q [b sq hq d], k and v [b sk hk d], mask [sq, sk]."""
    q, k, v = q.double(), k.double(), v.double()
    sharing = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(sharing, 2), v.repeat_interleave(sharing, 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[None, :, None, :], -math.inf)
    out = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """Return (dq, dk, dv) in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = attention(*leaves, mask)
    return torch.autograd.grad(out, leaves, dout.double())


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """Assert that the norm of the difference is at most ``tolerance`` times the larger of the exact norm and 1.

    Inputs have unit scale.  A gradient that is 0 everywhere (rows that see a single key) is the remainder of terms of
    unit scale that cancel, one per element.  Its scale is therefore the norm of a tensor of ones of its shape.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    cancelled = 0.0 if exact.any() else exact.numel() ** 0.5
    allowed = tolerance * max(exact.norm().item(), cancelled, 1.0)
    error = (actual.double() - exact).norm().item()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"  # fails for NaN, too
