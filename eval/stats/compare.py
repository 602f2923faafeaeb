"""Paired comparison of a variant with its baseline: arithmetic on outcomes only, independent of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Numbers = NDArray[np.float64]
Verdict = Literal["no worse", "worse", "undecided"]
LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_MIN_TEXTS = 10  # with fewer texts, a bootstrap interval covers the truth in far less than 95 % of all cases
_MAX_NEEDED = 10**8  # examples; a difference very close to the limit would need arbitrarily many


@dataclass(frozen=True)
class Comparison:
    """Accuracy of a variant and of its baseline on the same ``n`` examples.

    ``difference`` is variant - baseline; ``low`` and ``high`` are its 95 % interval by paired bootstrap.
    ``lost`` and ``won`` count the examples whose outcome fell and rose.
    ``p_mcnemar`` tests that both are equally likely: McNemar's exact test for one task of right and wrong answers,
    else a sign-flip test of the average.
    ``needed``: if the verdict is undecided, how many examples like these would decide it; None if no number would.
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
    """Compare accuracies averaged over ``tasks``, each a pair (baseline, variant) of outcomes from 0 to 1.

    The outcomes of a pair are of the same examples in the same order.  Each task has the same weight, and is
    resampled by itself.  The verdict is a test of non-inferiority: ``no worse`` if the whole interval lies above
    -``allowed_drop``, ``worse`` if it lies below.  Bonett and Price's interval must agree, because the bootstrap of
    outcomes that never differ is a single point, however few examples there are.
    """
    paired = [(np.asarray(base, float), np.asarray(other, float)) for base, other in tasks]
    assert paired and all(len(base) == len(other) > 0 for base, other in paired), "the same examples, at least one"
    # 1. The interval of the difference.
    differences = [other - base for base, other in paired]
    low, high = _bootstrap_interval(differences, resamples, np.random.default_rng(seed))
    # 2. The test that losing and winning are equally likely.
    pooled = np.concatenate(differences)
    lost, won = int((pooled < 0).sum()), int((pooled > 0).sum())
    is_binary = len(differences) == 1 and set(np.abs(pooled)) <= {0.0, 1.0}
    p_value = mcnemar(lost, won) if is_binary else _sign_flip(differences, resamples, np.random.default_rng(seed))
    # 3. The verdict, by the wider ends of both intervals.
    adjusted = _bonett_price_interval(differences)
    verdict = _decide(min(low, adjusted[0]), max(high, adjusted[1]), allowed_drop)
    return Comparison(
        n=len(pooled),
        baseline=float(np.mean([base.mean() for base, _ in paired])),
        accuracy=float(np.mean([other.mean() for _, other in paired])),
        difference=float(np.mean([one.mean() for one in differences])),
        low=low,
        high=high,
        lost=lost,
        won=won,
        p_mcnemar=p_value,
        verdict=verdict,
        needed=_examples_needed(differences, allowed_drop) if verdict == "undecided" else None,
    )


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947): a changed example is equally likely lost or won."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def _sign_flip(differences: Sequence[Numbers], resamples: int, random: np.random.Generator) -> float:
    """Two-sided sign-flip permutation test of the mean difference, in which tasks have the same weight.

    McNemar's test on pooled examples would give the largest task the most weight.
    """
    totals = np.zeros(resamples)
    for one in differences:
        for size, count in zip(*np.unique(np.abs(one), return_counts=True), strict=True):
            totals += size * (2 * random.binomial(count, 0.5, resamples) - count) / len(one)
    observed = abs(sum(one.mean() for one in differences)) * (1 - 1e-9)
    return float(((np.abs(totals) >= observed).sum() + 1) / (resamples + 1))


def is_near_chance(outcomes: Sequence[float], chance: float) -> bool:
    """Return whether the accuracy is not better than ``chance`` by a one-sided exact binomial test at 95 %."""
    return bool(binomtest(round(sum(outcomes)), len(outcomes), chance, "greater").pvalue > 1 - LEVEL)


@dataclass(frozen=True)
class Perplexity:
    """Perplexities per word on the same ``n`` texts.

    ``ratio`` is variant / baseline; ``low`` and ``high`` are its 95 % interval, None for fewer than ten texts.
    """

    n: int
    baseline: float
    perplexity: float
    ratio: float
    low: float | None
    high: float | None


def compare_perplexity(
    base: Sequence[float], other: Sequence[float], words: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Perplexity:
    """Compare log-likelihoods (nats) of the same texts by baseline and variant; ``words`` are the texts' lengths.

    The interval is a bootstrap over texts.
    """
    texts = np.stack([np.asarray(x, float) for x in (base, other, words)], 1)
    a, b, total = texts.mean(0)
    low = high = None
    if len(texts) >= _MIN_TEXTS:
        means = _resample_means(texts, resamples, np.random.default_rng(seed))
        low, high = (_exp(end) for end in _percentile_interval((means[:, 0] - means[:, 1]) / means[:, 2]))
    return Perplexity(len(texts), _exp(-a / total), _exp(-b / total), _exp((a - b) / total), low, high)


def _exp(x: float) -> float:
    """Return the exponential of ``x``, inf if it is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _bootstrap_interval(
    differences: Sequence[Numbers], resamples: int, random: np.random.Generator
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean difference, averaged over tasks."""
    means = [_resample_means(one[:, None], resamples, random)[:, 0] for one in differences]
    return _percentile_interval(np.mean(means, 0))


def _percentile_interval(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resample_means(rows: Numbers, resamples: int, random: np.random.Generator) -> Numbers:
    """Return column means, [resamples columns], of ``rows`` drawn with replacement, as many as there are.

    Equal rows are drawn together by a multinomial count: differences of right/wrong outcomes are only -1, 0 and 1.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    out = np.empty((resamples, rows.shape[1]))
    batch = max(1, 10**7 // len(kinds))  # resamples at a time, to bound memory
    for begin in range(0, resamples, batch):
        part = out[begin : begin + batch]
        part[:] = random.multinomial(len(rows), counts / len(rows), len(part)) @ kinds / len(rows)
    return out


def _bonett_price_interval(differences: Sequence[Numbers], scale: float = 1.0) -> tuple[float, float]:
    """Return Bonett and Price's adjusted interval (J. Educ. Behav. Stat. 37(4), 2012), which is never a point.

    Each task gets one more lost and one more won example.  ``scale`` multiplies the number of examples of each kind.
    """
    means, variances = [], []
    for one in differences:
        n = scale * len(one) + 2
        means.append(scale * one.sum() / n)
        variances.append(((scale * (one**2).sum() + 2) / n - means[-1] ** 2) / n)
    half = _Z * np.sqrt(sum(variances)) / len(means)
    return float(np.mean(means) - half), float(np.mean(means) + half)


def _decide(low: float, high: float, allowed_drop: float) -> Verdict:
    if low > -allowed_drop:
        return "no worse"
    return "worse" if high < -allowed_drop else "undecided"


def _examples_needed(differences: Sequence[Numbers], allowed_drop: float) -> int | None:
    """Return how many examples decide if the shares of lost and won stay the same; None if more than 10^8."""
    n = sum(map(len, differences))

    def decides(scale: float) -> bool:
        return _decide(*_bonett_price_interval(differences, scale), allowed_drop) != "undecided"

    # Double until it decides, then bisect to the example.
    few, many = 1.0, 2.0
    while not decides(many):
        few, many = many, 2 * many
        if many * n > _MAX_NEEDED:
            return None
    while (many - few) * n > 1:
        middle = (few + many) / 2
        few, many = (few, middle) if decides(middle) else (middle, many)
    return ceil(many * n)
