"""Guards of a model with dropped reductions: faults that an average over long sequences hides.

An average over 512 tokens can look good while the first tokens of every text are lost, a few sequences collapse, or the
model no longer copies from its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.perplexity import perplexity

if TYPE_CHECKING:
    from longctx.shapes import Bool, Float, Tensor

FIRST_TOKENS = (8, 64)
# Largest relative increase of a perplexity: of many sequences, and of a single sequence, which varies more.
_INCREASE, _INCREASE_OF_ONE = 0.5, 1.0
_COPIED_LOSS = 0.25  # largest decrease of the share of tokens copied
_NORM_LOSS = 0.5  # largest relative decrease of the first token's norm


@dataclass(frozen=True)
class GuardFigures:
    """Figures of a model on held-out sequences.

    ``losses`` are nats per token; those where ``mask`` is False do not count.  ``first_norms`` has, for each sequence,
    the largest norm of the first token's hidden states after any block (its massive activation, the attention sink).
    ``copied`` is measured on a random sequence followed by its repetition: the share of tokens of the repetition that
    the model predicts.
    """

    losses: Float[Tensor, "sequences tokens"]
    mask: Bool[Tensor, "sequences tokens"]
    first_norms: Float[Tensor, " sequences"]
    copied: float

    def loss(self, tokens: int | None = None) -> float:
        """Return the mean loss of the first ``tokens`` of all sequences (None: all tokens), in nats per token."""
        return float(self.losses[:, :tokens][self.mask[:, :tokens]].mean())


@dataclass(frozen=True)
class Guard:
    """A figure of the original model, of the model with dropped reductions, and of the same model repaired.

    ``change`` is positive if the repaired model is worse: the relative increase of a perplexity, the relative decrease
    of a norm, or the decrease of a share.  The guard fails if ``change`` is more than ``limit``.
    """

    name: str
    original: float
    dropped: float
    repaired: float
    change: float
    limit: float

    @property
    def failed(self) -> bool:
        """True if the repaired model is worse than allowed, or if ``change`` is NaN."""
        return not self.change <= self.limit


def compare_guards(original: GuardFigures, dropped: GuardFigures, repaired: GuardFigures) -> list[Guard]:
    """Return the guards, each with its figures in the three models, which were measured on the same sequences."""
    models = (original, dropped, repaired)
    # 1. Perplexities of first tokens and of all tokens.
    losses = {f"perplexity of the first {n} tokens": [one.loss(n) for one in models] for n in FIRST_TOKENS}
    losses["perplexity of all tokens"] = [one.loss() for one in models]
    guards = [_perplexity_guard(name, values, _INCREASE) for name, values in losses.items()]
    # 2. The sequence whose loss rises most.
    means = [(one.losses * one.mask).sum(1) / one.mask.sum(1).clamp(min=1) for one in models]
    worst = int((means[2] - means[0]).nan_to_num(float("inf")).argmax())
    of_one = [float(mean[worst]) for mean in means]
    guards.append(_perplexity_guard("perplexity of the worst sequence", of_one, _INCREASE_OF_ONE))
    # 3. The sequence whose first token's norm decreases most.
    smallest = int((repaired.first_norms / original.first_norms).nan_to_num(0.0).argmin())
    norms = [float(one.first_norms[smallest]) for one in models]
    guards.append(_guard("norm of the first token, worst sequence", norms, 1 - norms[2] / norms[0], _NORM_LOSS))
    # 4. Copying.
    copied = [one.copied for one in models]
    guards.append(_guard("share of random tokens copied", copied, copied[0] - copied[2], _COPIED_LOSS))
    return guards


def _perplexity_guard(name: str, losses: list[float], limit: float) -> Guard:
    return _guard(name, [perplexity(loss) for loss in losses], perplexity(losses[2] - losses[0]) - 1, limit)


def _guard(name: str, figures: list[float], change: float, limit: float) -> Guard:
    original, dropped, repaired = figures
    return Guard(name, original, dropped, repaired, change, limit)
