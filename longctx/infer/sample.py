"""Sampling: the next token from logits, by the settings of `Sampling`.

The settings act in transformers' order: penalties, temperature, top-k, top-p, min-p.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.config import Sampling
from longctx.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats) of a ``token`` of an answer or of a prompt.

    ``top`` has (token, log-probability) of the most likely tokens in its place, the most likely one first; it is empty
    if none were requested.  ``token`` itself may be missing there.  Log-probabilities are the model's own, before
    penalties, temperature, top-k, top-p and min-p.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def choose_token(
    logits: Float[Tensor, " v"],
    sampling: Sampling,
    position: int,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> int:
    """Choose the next token from ``logits``: the most likely one at temperature 0, otherwise a random one.

    Random choice is among the tokens that top-k, top-p and min-p keep.  Penalties apply first, also at temperature 0.
    The repetition penalty acts on the tokens of ``prompt`` and ``answer``, the presence and frequency penalties on
    those of ``answer`` only.  ``position`` is that of the last token so far, whose row gave ``logits``.  Only
    ``sampling.seed`` and ``position`` seed the draw, so the same logits give the same token on any mesh and in any
    batch.

    Raises ValueError for logits that are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ValueError(
            f"no token can be chosen after position {position}: the logits are NaN or infinite: "
            "use model.dtype=float32, or a checkpoint whose weights are not damaged"
        )
    logits = penalize(logits, sampling, prompt, answer)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ranked, order = rank_candidates(logits, sampling)
    draw = torch.Generator().manual_seed(sampling.seed * 1_000_003 + position)
    return int(order[torch.multinomial(ranked, 1, generator=draw)])


def penalize(
    logits: Float[Tensor, " v"], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> Float[Tensor, " v"]:
    """Return ``logits`` after the penalties, in float64 on the CPU; without penalties, return ``logits`` unchanged.

    The repetition penalty is that of CTRL (arXiv 1909.05858, 4.1) as transformers applies it, to tokens of ``prompt``
    and ``answer``: it divides positive logits and multiplies negative ones.  Presence and frequency penalties follow
    OpenAI's API.  A token that occurs n > 0 times in ``answer`` loses n * ``frequency_penalty`` + ``presence_penalty``.
    """
    if sampling.repetition_penalty != 1:
        logits = logits.double().cpu().clone()
        seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.long)
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        logits = logits.double().cpu().clone()
        counts = Counter(answer)
        tokens = torch.tensor(list(counts), dtype=torch.long)
        number = torch.tensor(list(counts.values()), dtype=torch.double)
        logits[tokens] -= number * sampling.frequency_penalty + sampling.presence_penalty
    return logits


def rank_candidates(logits: Float[Tensor, " v"], sampling: Sampling) -> tuple[Float[Tensor, " v"], Int[Tensor, " v"]]:
    """Return the probabilities of all tokens at ``sampling.temperature``, largest first, and the tokens in this order.

    The temperature must be above 0.  Tokens that top-k, top-p or min-p cut off have probability 0; the probabilities of
    the other tokens need not sum to 1.  Both tensors are on the CPU.
    """
    ranked, order = torch.softmax(logits.double().cpu() / sampling.temperature, -1).sort(descending=True, stable=True)
    if 0 < sampling.top_k < len(ranked):
        ranked = ranked.masked_fill(ranked < ranked[sampling.top_k - 1], 0.0)  # equal ones stay, as in transformers
        ranked = ranked / ranked.sum()
    before = ranked.cumsum(0) - ranked
    ranked = ranked.masked_fill(before >= sampling.top_p, 0.0)  # the most likely token always stays
    return ranked.masked_fill(ranked < sampling.min_p * ranked[0], 0.0), order


def token_logprob(logits: Float[Tensor, " v"], token: int, top: int) -> TokenLogprob:
    """Return the log-probability of ``token`` and of the ``top`` most likely tokens (0: none), computed in float64.

    Among equally likely tokens, the one with the lower number comes first.
    """
    logprobs = torch.log_softmax(logits.double().cpu(), -1)
    if not top:
        return TokenLogprob(token, float(logprobs[token]))
    least = logprobs.topk(min(top, len(logprobs))).values[-1]  # a whole sort would take as long as the model's layers
    candidates = (logprobs >= least).nonzero()[:, 0]
    order = logprobs[candidates].sort(descending=True, stable=True).indices
    likeliest = candidates[order][:top].tolist()
    return TokenLogprob(token, float(logprobs[token]), tuple((one, float(logprobs[one])) for one in likeliest))
