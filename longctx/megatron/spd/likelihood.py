"""How likely tokens are: of each row few numbers leave a tensor-parallel rank, not its logits."""

from typing import Any

import torch

from longctx.megatron.model import GPTModel
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Int, Tensor


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], targets: Int[Tensor, "s b"], tp: Comm, vocab_size: int
) -> tuple[Float[Tensor, "s b"], Int[Tensor, "s b"]]:
    """Log-probability (nats, float64) of each row's target, and the likeliest token, on every rank of ``tp``.

    Every rank has the logits of its share of the ``vocab_size``; their largest, the sum of their exponentials, the
    target's and the place of the largest are all that is exchanged.
    """
    part, first = _share_of_logits(model, hidden, tp, vocab_size)
    largest, at = part.max(-1)
    exponentials = (part - largest.unsqueeze(-1)).exp().sum(-1)
    here = targets - first
    held = (here >= 0) & (here < part.shape[-1])
    target = part.gather(-1, here.clamp(0, part.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    target = target.masked_fill(~held, -torch.inf)
    mine = torch.stack([x.double() for x in (largest, exponentials, target, at + first)])
    largest, exponentials, target, likeliest = torch.stack(tp.all_gather(mine, [tuple(mine.shape)] * tp.size), 1)
    top, best = largest.max(0)
    total = (exponentials * (largest - top).exp()).sum(0)
    return target.amax(0) - top - total.log(), likeliest.gather(0, best.unsqueeze(0)).squeeze(0).long()


def log_shares(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], tp: Comm, vocab_size: int
) -> Float[Tensor, "s b share"]:
    """Log-probabilities (nats) of this rank's share of the ``vocab_size``.  No gradient."""
    with torch.no_grad():
        part, _ = _share_of_logits(model, hidden, tp, vocab_size)
        return part - _normaliser(part, tp)


def divergence(
    model: GPTModel,
    hidden: Float[Tensor, "s b hidden"],
    wanted: Float[Tensor, "s b share"],
    tp: Comm,
    vocab_size: int,
) -> Float[Tensor, "s b"]:
    """Kullback-Leibler divergence (nats) of each row's prediction from ``wanted``, another's `log_shares`.

    Every rank has all of it, and of its gradient what goes through its share.
    """
    part, _ = _share_of_logits(model, hidden, tp, vocab_size)
    rows: Tensor = _Divergence.apply(part, wanted, tp)
    return rows


class _Divergence(torch.autograd.Function):
    """Sum over all ranks' shares of p (log p - log q), q the softmax of logits: its gradient is q - p."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, wanted: Tensor, tp: Comm) -> Tensor:
        got = part - _normaliser(part, tp)
        ctx.save_for_backward(got, wanted)
        mine = (wanted.exp() * (wanted - got)).sum(-1)
        return torch.stack(tp.all_gather(mine, [tuple(mine.shape)] * tp.size)).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        got, wanted = ctx.saved_tensors
        return gradient.unsqueeze(-1) * (got.exp() - wanted.exp()), None, None


def _share_of_logits(model: GPTModel, hidden: Tensor, tp: Comm, vocab_size: int) -> tuple[Tensor, int]:
    """float32 logits of this rank's share of the ``vocab_size``, without padding, and the first token of the share."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    part, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=False)
    first = tp.rank * part.shape[-1]
    return part[..., : max(0, vocab_size - first)].float(), first


def _normaliser(part: Tensor, tp: Comm) -> Tensor:
    """Logarithm of the sum of all ranks' exponentials [s b 1]."""
    mine = part.logsumexp(-1, keepdim=True)
    return torch.stack(tp.all_gather(mine, [tuple(mine.shape)] * tp.size)).logsumexp(0)
