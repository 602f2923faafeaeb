"""Log-likelihoods and divergences from vocabulary-parallel logits.

Ranks exchange a few numbers per row instead of the logits.
"""

from typing import Any

import torch

from longctx.megatron.model import GPTModel, tied_weight
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Int, Tensor


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], targets: Int[Tensor, "s b"], tp: Comm, vocab_size: int
) -> tuple[Float[Tensor, "s b"], Int[Tensor, "s b"]]:
    """Return each row's log-probability of its target (nats, float64) and its most likely token, on every rank.

    Each rank computes the logits of its shard of the vocabulary.  Per row, ranks exchange four numbers: the shard's
    largest logit, the token that has it, the sum of exponentials, and the target's logit (-inf in other shards).
    """
    # 1. Per shard: the largest logit, and the sum of exponentials relative to it.
    shard, first = _logits_shard(model, hidden, tp, vocab_size)
    largest, argmax = shard.max(-1)
    exponentials = (shard - largest.unsqueeze(-1)).exp().sum(-1)
    # 2. The target's logit, on the one rank whose shard has the target.
    index = targets - first
    in_shard = (index >= 0) & (index < shard.shape[-1])
    target = shard.gather(-1, index.clamp(0, shard.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    target = target.masked_fill(~in_shard, -torch.inf)
    # 3. Combine the shards of all ranks, stacked along dim 0.
    local = torch.stack([x.double() for x in (largest, exponentials, target, argmax + first)])
    largest, exponentials, target, likeliest = torch.stack(tp.all_gather(local, [tuple(local.shape)] * tp.size), 1)
    top, best_rank = largest.max(0)
    total = (exponentials * (largest - top).exp()).sum(0)
    return target.amax(0) - top - total.log(), likeliest.gather(0, best_rank.unsqueeze(0)).squeeze(0).long()


def log_prob_shard(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], tp: Comm, vocab_size: int
) -> Float[Tensor, "s b shard"]:
    """Return the log-probabilities (nats) of the tokens in this rank's shard of the vocabulary.  No gradient.

    Every rank of ``tp`` calls this.  Padding of the vocabulary is left out, so the last shards may be smaller.
    """
    with torch.no_grad():
        shard, _ = _logits_shard(model, hidden, tp, vocab_size)
        return shard - _log_normaliser(shard, tp)


def kl_divergence(
    model: GPTModel,
    hidden: Float[Tensor, "s b hidden"],
    teacher: Float[Tensor, "s b shard"],
    tp: Comm,
    vocab_size: int,
) -> Float[Tensor, "s b"]:
    """Return KL(teacher || model) of each row's prediction (nats), on every rank.

    ``teacher`` is a `log_prob_shard`; the model's predictions come from ``hidden``.  In the backward, each rank
    computes the gradient of its own shard of the logits.  The output layer sums the gradient of ``hidden`` over ``tp``.
    """
    shard, _ = _logits_shard(model, hidden, tp, vocab_size)
    rows: Tensor = _KLDivergence.apply(shard, teacher, tp)  # type: ignore[no-untyped-call]
    return rows


class _KLDivergence(torch.autograd.Function):
    """Sum over all shards of p (log p - log q) with q = softmax(logits); the gradient of the logits is q - p."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, teacher: Tensor, tp: Comm) -> Tensor:
        log_q = shard - _log_normaliser(shard, tp)
        ctx.save_for_backward(log_q, teacher)
        local = (teacher.exp() * (teacher - log_q)).sum(-1)
        return torch.stack(tp.all_gather(local, [tuple(local.shape)] * tp.size)).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_q, teacher = ctx.saved_tensors
        return gradient.unsqueeze(-1) * (log_q.exp() - teacher.exp()), None, None


def _logits_shard(model: GPTModel, hidden: Tensor, tp: Comm, vocab_size: int) -> tuple[Tensor, int]:
    """Return logits of this rank's shard of the vocabulary, without padding, and the shard's first token.

    Logits are float32, or float64 for a model in float64.
    """
    shard, _ = model.output_layer(hidden, weight=tied_weight(model), runtime_gather_output=False)
    first = tp.rank * shard.shape[-1]
    return shard[..., : max(0, vocab_size - first)].to(torch.promote_types(shard.dtype, torch.float32)), first


def _log_normaliser(shard: Tensor, tp: Comm) -> Tensor:
    """Return log sum exp [s b 1] over the logits of all shards."""
    local = shard.logsumexp(-1, keepdim=True)
    return torch.stack(tp.all_gather(local, [tuple(local.shape)] * tp.size)).logsumexp(0)
