"""Paired comparison of a variant with its baseline: arithmetic on outcomes only, independent of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

from eval.stats.interval import Numbers, count_changes, score_interval
from eval.stats.needed import examples_needed
from longctx.perplexity import difference_interval, perplexity

Verdict = Literal["no worse", "worse", "undecided"]
Pair = tuple[Sequence[float], Sequence[float]]  # outcomes of the baseline and of a variant on the same examples
LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
SCREENED = 200  # number of first examples from which a task is judged to be near chance
_MIN_EXAMPLES = 10  # below this, means have no interval: Student's t needs values that are not too far from normal


@dataclass(frozen=True)
class Comparison:
    """Accuracy of a variant and of its baseline on the same ``n`` examples.

    ``difference`` is variant - baseline; ``low`` and ``high`` are its 95 % interval, from which the verdict follows.
    ``lost`` and ``won`` count the examples whose outcome fell and rose.
    ``p_mcnemar`` is the p-value of the hypothesis that a fall and a rise are equally likely.  It is that of McNemar's
    exact test for one task of right and wrong answers, else that of a sign-flip test of the average.  It is None if the
    number of examples depended on the outcomes.

    ``needed`` is `examples_needed` of each task, if the verdict is undecided.  It is None if the verdict is reached, or
    if the sets are too small to reach one.
    """

    n: int
    baseline: float
    accuracy: float
    difference: float
    low: float
    high: float
    lost: int
    won: int
    p_mcnemar: float | None
    verdict: Verdict
    needed: tuple[int, ...] | None


def compare(
    tasks: Sequence[Pair],
    *,
    allowed_drop: float = 0.01,
    available: Sequence[int | None] | None = None,
    z: float = Z,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare accuracies averaged over ``tasks``, each a pair (baseline, variant) of outcomes from 0 to 1.

    Each task has the same weight.  The verdict is a test of non-inferiority: ``no worse`` if the whole interval lies
    above -``allowed_drop``, ``worse`` if it lies below.  ``z`` is the normal quantile of the interval.  Pass another
    value than `Z` if the number of examples depended on the outcomes; there is then no p-value.  ``available`` is the
    number of examples that each task has (None: any number).  ``resamples`` and ``seed`` are those of the sign-flip
    test.
    """
    paired = [(np.asarray(base, float), np.asarray(other, float)) for base, other in tasks]
    assert paired and all(len(base) == len(other) > 0 for base, other in paired), "the same examples, at least one"
    # 1. The interval of the difference, and the verdict.
    differences = [other - base for base, other in paired]
    changes = count_changes(differences)
    difference = float(np.mean([one.mean() for one in differences]))
    ends = map(float, score_interval(changes, z))
    low, high = (pick(end, difference) for pick, end in zip((min, max), ends, strict=True))  # rounding may exceed it
    verdict = decide(low, high, allowed_drop)
    # 2. The test that losing and winning are equally likely.
    pooled = np.concatenate(differences)
    lost, won = int((pooled < 0).sum()), int((pooled > 0).sum())
    p_value = _test_change(differences, lost, won, resamples, seed) if z == Z else None
    needed = None
    if verdict == "undecided":
        limits = available or [None] * len(differences)
        needed = examples_needed(changes, limits, allowed_drop, z)
    return Comparison(
        n=len(pooled),
        baseline=float(np.mean([base.mean() for base, _ in paired])),
        accuracy=float(np.mean([other.mean() for _, other in paired])),
        difference=difference,
        low=low,
        high=high,
        lost=lost,
        won=won,
        p_mcnemar=p_value,
        verdict=verdict,
        needed=needed,
    )


def verdicts_without(tasks: Sequence[Pair], *, allowed_drop: float, z: float = Z) -> list[Verdict]:
    """Return, for each of ``tasks``, the verdict on the average of the others; there must be two tasks or more.

    If one differs from the verdict on all tasks, that verdict rests on one task, whose gain may hide losses of others.
    """
    differences = [np.asarray(other, float) - np.asarray(base, float) for base, other in tasks]
    verdicts = []
    for i in range(len(differences)):
        low, high = map(float, score_interval(count_changes(differences[:i] + differences[i + 1 :]), z))
        verdicts.append(decide(low, high, allowed_drop))
    return verdicts


def decide(low: float, high: float, allowed_drop: float) -> Verdict:
    """Return the verdict that follows from the interval (``low``, ``high``) of the difference variant - baseline.

    It is "no worse" if the whole interval lies above -``allowed_drop``, "worse" if it lies below, else "undecided".
    """
    if low > -allowed_drop:
        return "no worse"
    return "worse" if high < -allowed_drop else "undecided"


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947).

    It tests the hypothesis that an example whose outcome changed was equally likely lost or won.
    """
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def _test_change(differences: Sequence[Numbers], lost: int, won: int, resamples: int, seed: int) -> float:
    """Return the p-value of McNemar's test for one task of right and wrong answers, else of a sign-flip test."""
    is_binary = len(differences) == 1 and set(np.abs(differences[0])) <= {0.0, 1.0}
    return mcnemar(lost, won) if is_binary else _sign_flip(differences, resamples, np.random.default_rng(seed))


def _sign_flip(differences: Sequence[Numbers], resamples: int, random: np.random.Generator) -> float:
    """Return the p-value of a two-sided sign-flip test of the mean difference, in which tasks have the same weight.

    McNemar's test on pooled examples would give the largest task the most weight.
    """
    totals = np.zeros(resamples)
    for one in differences:
        for size, count in zip(*np.unique(np.abs(one), return_counts=True), strict=True):
            totals += size * (2 * random.binomial(count, 0.5, resamples) - count) / len(one)
    observed = abs(sum(one.mean() for one in differences)) * (1 - 1e-9)
    return float(((np.abs(totals) >= observed).sum() + 1) / (resamples + 1))


def is_near_chance(outcomes: Sequence[float], chance: float) -> bool:
    """Return True unless the accuracy is better than ``chance`` by a one-sided exact binomial test at 95 %.

    Only the first `SCREENED` outcomes count, so that the choice of averaged tasks does not depend on the sample size.
    With chance 0, any outcome above 0 is better.  Outcomes that are shares count as the whole answers in their sum,
    rounded down.  They vary less than whole answers, so the test is cautious.
    """
    screened = outcomes[:SCREENED]
    if not chance:
        return not any(screened)
    whole = int(sum(screened) + 1e-9)
    return bool(binomtest(whole, len(screened), chance, "greater").pvalue > 1 - LEVEL)


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
    base: Sequence[float], other: Sequence[float], words: Sequence[float], *, z: float = Z
) -> Perplexity:
    """Compare log-likelihoods (nats) of the same texts by baseline and variant.

    ``words`` has the length of each text in words.  ``z`` is the normal quantile of the interval.
    """
    base_loss, other_loss = ([-value for value in values] for values in (base, other))
    difference, low, high = difference_interval(base_loss, other_loss, words, level_of(z))
    has_interval = len(words) >= _MIN_EXAMPLES
    return Perplexity(
        n=len(words),
        baseline=perplexity(sum(base_loss) / sum(words)),
        perplexity=perplexity(sum(other_loss) / sum(words)),
        ratio=perplexity(difference),
        low=perplexity(low) if has_interval else None,
        high=perplexity(high) if has_interval else None,
    )


@dataclass(frozen=True)
class MarginChange:
    """Mean change of the right answer's log-probability margin, in nats.

    ``low`` and ``high`` are its 95 % interval; None if a task has fewer than ten examples.
    """

    n: int
    difference: float
    low: float | None
    high: float | None


def compare_margins(tasks: Sequence[Pair], *, z: float = Z) -> MarginChange:
    """Compare margins (nats) averaged over ``tasks``, each a pair (baseline, variant); each task has the same weight.

    The interval is Welch's: Student's t with Satterthwaite's degrees of freedom.
    """
    differences = [np.asarray(other, float) - np.asarray(base, float) for base, other in tasks]
    n, mean = sum(map(len, differences)), float(np.mean([one.mean() for one in differences]))
    if min(map(len, differences)) < _MIN_EXAMPLES:
        return MarginChange(n, mean, None, None)
    errors = np.array([one.var(ddof=1) / len(one) for one in differences]) / len(differences) ** 2
    freedom = np.array([len(one) - 1 for one in differences])
    total = float(errors.sum())
    half = 0.0
    if total > 0:
        half = float(student.ppf((1 + level_of(z)) / 2, total**2 / (errors**2 / freedom).sum())) * total**0.5
    return MarginChange(n, mean, mean - half, mean + half)


def level_of(z: float) -> float:
    """Return the level of a two-sided interval with the normal quantile ``z``: 0.95 for 1.96."""
    return 2 * NormalDist().cdf(z) - 1
