"""Is a changed model worse?  Statistics of paired outcomes: arithmetic only, it knows no models."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Numbers = NDArray[np.float64]
Verdict = Literal["no worse", "worse", "undecided"]
LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_FEWEST_TEXTS = 10  # of fewer, resampled, the middle 95 % hold the truth in far less than 95 %
_MOST_NEEDED = 10**8  # examples: nobody has more, and a difference at the very limit would ask for any number


@dataclass(frozen=True)
class Comparison:
    """A variant beside its baseline, on the same ``n`` examples.

    ``difference`` (variant - baseline) lies between ``low`` and ``high`` by a paired bootstrap, at 95 %.  ``lost`` and
    ``won`` count the examples whose outcome fell and rose; ``p_mcnemar`` is the exact test that they are as many, or
    of several tasks, and of outcomes that are no whole numbers, the test of `_flipped`.
    ``needed`` is how many examples would decide an undecided verdict if what was seen stays as it is.
    """

    n: int
    baseline: float
    accuracy: float
    difference: float
    low: float
    high: float
    lost: int
    won: int
    p_mcnemar: float
    verdict: Verdict
    needed: int | None


def compare(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    allowed_drop: float = 0.01,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """The average over ``tasks``, each the outcomes (0 to 1) of baseline and variant on the same examples in order.

    Each task weighs the same, and is resampled by itself.  The verdict is of non-inferiority: ``no worse`` if a drop
    of ``allowed_drop`` is outside the interval, ``worse`` if all of the interval is below it.  To be either it
    has to be so by the adjusted interval (see `_adjusted`) as well: the bootstrap of outcomes that never differ is a
    point, however few they are.
    """
    paired = [(np.asarray(base, float), np.asarray(other, float)) for base, other in tasks]
    assert paired and all(len(base) == len(other) > 0 for base, other in paired), "the same examples, at least one"
    differences = [other - base for base, other in paired]
    low, high = _interval(differences, resamples, np.random.default_rng(seed))
    every = np.concatenate(differences)
    lost, won = int((every < 0).sum()), int((every > 0).sum())
    plain = len(differences) == 1 and set(np.abs(every)) <= {0.0, 1.0}
    adjusted = _adjusted(differences)
    verdict = _verdict(min(low, adjusted[0]), max(high, adjusted[1]), allowed_drop)
    return Comparison(
        n=len(every),
        baseline=float(np.mean([base.mean() for base, _ in paired])),
        accuracy=float(np.mean([other.mean() for _, other in paired])),
        difference=float(np.mean([one.mean() for one in differences])),
        low=low,
        high=high,
        lost=lost,
        won=won,
        p_mcnemar=mcnemar(lost, won) if plain else _flipped(differences, resamples, np.random.default_rng(seed)),
        verdict=verdict,
        needed=_needed(differences, allowed_drop) if verdict == "undecided" else None,
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value that an example that changes is as likely to be lost as won (McNemar 1947)."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def _flipped(differences: Sequence[Numbers], resamples: int, random: np.random.Generator) -> float:
    """Two-sided p-value that a change is as likely to be the other way round, of signs that change at random.

    McNemar's test of the average that is told, in which tasks weigh the same: pooled, the largest would rule.
    """
    totals = np.zeros(resamples)
    for one in differences:
        for size, count in zip(*np.unique(np.abs(one), return_counts=True), strict=True):
            totals += size * (2 * random.binomial(count, 0.5, resamples) - count) / len(one)
    seen = abs(sum(one.mean() for one in differences)) * (1 - 1e-9)
    return float(((np.abs(totals) >= seen).sum() + 1) / (resamples + 1))


def near_chance(outcomes: Sequence[float], chance: float) -> bool:
    """Whether guessing, right in ``chance`` of all cases, would do as well: at 95 %, one-sided and exact."""
    return bool(binomtest(round(sum(outcomes)), len(outcomes), chance, "greater").pvalue > 1 - LEVEL)


@dataclass(frozen=True)
class Perplexity:
    """Perplexities on the same ``n`` texts; ``ratio`` (variant / baseline) is from ``low`` to ``high``, at 95 %."""

    n: int
    baseline: float
    perplexity: float
    ratio: float
    low: float | None
    high: float | None


def compare_perplexity(
    base: Sequence[float], other: Sequence[float], words: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Perplexity:
    """Of texts of so many ``words``, their log-likelihoods (nats) by baseline and variant.

    Texts are resampled for the ends of the interval, which are None where there are too few of them for that.
    """
    rows = np.stack([np.asarray(x, float) for x in (base, other, words)], 1)
    a, b, total = rows.mean(0)
    low = high = None
    if len(rows) >= _FEWEST_TEXTS:
        sums = _resampled(rows, resamples, np.random.default_rng(seed))
        low, high = (exp(end) for end in _middle((sums[:, 0] - sums[:, 1]) / sums[:, 2]))
    return Perplexity(len(rows), exp(-a / total), exp(-b / total), exp((a - b) / total), low, high)


def _interval(differences: Sequence[Numbers], resamples: int, random: np.random.Generator) -> tuple[float, float]:
    """The middle 95 % of the average of resampled tasks' mean differences."""
    means = [_resampled(one[:, None], resamples, random)[:, 0] for one in differences]
    return _middle(np.mean(means, 0))


def _middle(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(rows: Numbers, resamples: int, random: np.random.Generator) -> Numbers:
    """Means [resamples columns] of as many rows as there are, drawn with replacement.

    Equal rows are drawn together, how often is one multinomial number: a task of right and wrong has three kinds.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    out = np.empty((resamples, rows.shape[1]))
    at_a_time = max(1, 10**7 // len(kinds))
    for begin in range(0, resamples, at_a_time):
        part = out[begin : begin + at_a_time]
        part[:] = random.multinomial(len(rows), counts / len(rows), len(part)) @ kinds / len(rows)
    return out


def _adjusted(differences: Sequence[Numbers], times: float = 1.0) -> tuple[float, float]:
    """The ends of Bonett and Price's interval (J. Educ. Behav. Stat. 37(4), 2012), which is never a point.

    Each task has one more example lost and one more won.  ``times`` is as if all examples were there so often.
    """
    means, variances = [], []
    for one in differences:
        n = times * len(one) + 2
        means.append(times * one.sum() / n)
        variances.append(((times * (one**2).sum() + 2) / n - means[-1] ** 2) / n)
    half = _Z * np.sqrt(sum(variances)) / len(means)
    return float(np.mean(means) - half), float(np.mean(means) + half)


def _verdict(low: float, high: float, allowed_drop: float) -> Verdict:
    if low > -allowed_drop:
        return "no worse"
    return "worse" if high < -allowed_drop else "undecided"


def _needed(differences: Sequence[Numbers], allowed_drop: float) -> int | None:
    """Examples that decide, if there are more of the kind that was seen; None if there would never be enough."""
    n = sum(map(len, differences))

    def decides(times: float) -> bool:
        return _verdict(*_adjusted(differences, times), allowed_drop) != "undecided"

    few, many = 1.0, 2.0
    while not decides(many):
        few, many = many, 2 * many
        if many * n > _MOST_NEEDED:
            return None
    while (many - few) * n > 1:
        middle = (few + many) / 2
        few, many = (few, middle) if decides(middle) else (middle, many)
    return ceil(many * n)
