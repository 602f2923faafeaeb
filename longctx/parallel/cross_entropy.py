"""Cross-entropy over a vocabulary that ranks share, and its gradients, a chunk of logits at a time."""

from typing import Any

import torch

from longctx.onednn import Products, multiplies, multiply
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Int, Tensor

_PADDING_LOGIT = -1e9  # gives the padding of the vocabulary probability 0
_ADDED_ROWS = 128  # rows of the weight's gradient of which a chunk's part exists beside the total
ROWS = 192  # default number of rows of logits that exist at a time


def cross_entropy(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "v hidden"],
    targets: Int[Tensor, " n"],
    counts: Float[Tensor, " n"],
    tp: Comm,
    vocab_size: int,
    *,
    scale: float = 1.0,
    rows: int | None = ROWS,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """Return the sum of ``counts`` times cross-entropy, and each row's cross-entropy (nats), on every rank of ``tp``.

    The logits are ``scale`` * ``hidden`` @ ``weight``.T.  Rank r has rows r v to (r + 1) v - 1 of the vocabulary, which
    ``targets`` index; rows from ``vocab_size`` on are padding.  Logits of at most ``rows`` rows exist at a time (None:
    all), in float32 or a more precise dtype.  The forward also computes the gradients (Liger kernels, arXiv
    2410.10989), so no logits are computed twice.  The tensors saved for the backward have the sizes of ``hidden`` and
    ``weight``.

    Only the sum has gradients; the cross-entropy of single rows has none.  The gradient of ``hidden`` is this shard's
    term.  The caller must sum it over ``tp``.
    """
    learn = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, losses = _CrossEntropy.apply(hidden, weight, targets, counts, tp, vocab_size, scale, rows, learn)  # type: ignore[no-untyped-call]
    return total, losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        counts: Tensor,
        tp: Comm,
        vocab_size: int,
        scale: float,
        rows: int | None,
        learn: bool,
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=precise)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=precise) if learn and weight.requires_grad else None
        padding = (tp.rank + 1) * len(weight) - vocab_size
        for first in range(0, len(hidden), rows or max(1, len(hidden))):
            some = slice(first, first + rows if rows else None)
            # 1. Logits of some rows, which turn into their gradient in place.
            with Products():
                logits = torch.matmul(hidden[some], weight.T).to(precise).mul_(scale)
            if padding > 0:
                logits[:, max(0, len(weight) - padding) :] = _PADDING_LOGIT
            losses[some] = _logits_to_gradient(logits, targets[some], tp)
            # 2. Gradients of hidden states and weight.
            if learn:
                gradient = logits.mul_(counts[some, None]).mul_(scale).to(weight.dtype)
                with Products():
                    d_hidden[some] = torch.matmul(gradient, weight)
                if d_weight is not None:
                    _add_product(d_weight, gradient.T, hidden[some])
                del gradient
            del logits  # so that the next chunk's logits take their memory
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * counts).sum(), losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        of_weight = None if d_weight is None else d_weight.mul_(gradient).to(d_hidden.dtype)
        return d_hidden.mul_(gradient), of_weight, None, None, None, None, None, None, None


ALLOCATORS = (_CrossEntropy.forward, _CrossEntropy.backward)  # for a `MemoryMeter`: logits, and the loss's gradients


def _logits_to_gradient(logits: Tensor, targets: Tensor, tp: Comm) -> Tensor:
    """Return the cross-entropy [n] of ``targets``; turn ``logits`` [n v] into its gradient, softmax minus one-hot.

    Ranks exchange two numbers per row: the shard's log-sum-exp, and the target's logit (-inf if in another shard).
    """
    # 1. This shard's target logits and log-sum-exp.
    index = targets - tp.rank * logits.shape[1]
    in_shard = (index >= 0) & (index < logits.shape[1])
    row, column = torch.arange(len(logits), device=logits.device)[in_shard], index[in_shard]
    target = logits.new_full((len(logits),), -torch.inf, dtype=torch.float64)
    target[row] = logits[row, column].double()
    largest = logits.amax(1)
    exponentials = logits.sub_(largest[:, None]).exp_()
    lse = largest.double() + exponentials.sum(1).double().log()
    # 2. The log-sum-exp over all shards.
    local = torch.stack([lse, target])
    every_lse, every_target = torch.stack(tp.all_gather(local, [tuple(local.shape)] * tp.size), 1)
    lse = every_lse.logsumexp(0)
    # 3. The softmax over all shards, minus 1 at the target.
    exponentials.mul_((largest - lse).exp()[:, None].to(logits.dtype))
    exponentials[row, column] -= 1
    losses: Tensor = lse - every_target.amax(0)
    return losses.to(logits.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a`` @ ``b`` to ``total``, which may have a more precise dtype."""
    if multiplies(a, b):
        for chunk, rows in zip(total.split(_ADDED_ROWS), a.split(_ADDED_ROWS), strict=True):
            chunk.add_(multiply(rows, b))
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
