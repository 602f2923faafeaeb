"""Score interval of a paired difference of accuracies, averaged over tasks.

For one task it is Tango's interval (Statistics in Medicine 17, 1998), with a correction for skewness that can only
widen it.  For several tasks, each candidate average is
tested under the most likely task rates that give it.  The interval has the averages that are not rejected.  Its width
is never 0: even if no example changed, small true rates of change are possible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_STEPS = 40  # bisections of the logarithm of the tilt: to a relative 1e-10


@dataclass(frozen=True)
class Changes:
    """Changed examples of tasks; the arrays are [... tasks] and broadcast.

    ``lost`` and ``won`` count the examples, among ``n``, whose outcome fell and rose; they need not be integers.
    The average is the sum of ``weights * (won - lost) / n`` over tasks.
    """

    lost: Numbers
    won: Numbers
    n: Numbers
    weights: Numbers

    @property
    def average(self) -> Numbers:
        """The observed difference of outcomes, averaged over tasks, [...]."""
        return np.asarray((self.weights * (self.won - self.lost) / self.n).sum(-1))


def count_changes(differences: Sequence[Numbers]) -> Changes:
    """Return the changes of tasks with these ``differences`` of outcomes; each task has the same weight.

    Example: four examples that each gain 0.5 count as four changes of size 0.5.  Unequal changes are
    replaced by equal ones with the same sum and sum of squares.  The task's weight includes their size.
    """
    sums = [np.abs(one).sum() for one in differences]
    sizes = np.array([(one**2).sum() / total if total else 1.0 for one, total in zip(differences, sums, strict=True)])
    lost, won = (np.array([np.maximum(sign * one, 0).sum() for one in differences]) / sizes for sign in (-1, 1))
    return Changes(lost, won, np.array([float(len(one)) for one in differences]), sizes / len(differences))


def score_interval(changes: Changes, z: float) -> tuple[Numbers, Numbers]:
    """Return the lower and upper ends [...] of the interval of the average difference; ``z`` is its normal quantile."""
    return score_limit(changes, z, -1), score_limit(changes, z, 1)


def score_limit(changes: Changes, z: float, side: int) -> Numbers:
    """Return the lower (``side`` -1) or upper (1) end of `score_interval`.

    For each value of the average, one set of rates is the most likely.  One parameter, the tilt (the Lagrange
    multiplier of the average), runs through these sets.  Bisection finds the tilt whose average is ``z`` standard
    errors from the observed average.
    """
    largest = np.log(np.asarray(changes.n / changes.weights).max(-1)) + 35
    high = np.broadcast_to(largest, changes.average.shape)
    low = np.full_like(high, -10.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        is_beyond = _is_beyond(changes, z, side, np.exp(middle))
        low, high = np.where(is_beyond, low, middle), np.where(is_beyond, middle, high)
    falls, rises = tilted_rates(changes, side * np.exp(high))
    return np.asarray((changes.weights * (rises - falls)).sum(-1))


def _is_beyond(changes: Changes, z: float, side: int, tilt: Numbers) -> NDArray[np.bool_]:
    """Return whether the observed average is further than ``z`` from the one that ``tilt`` implies.

    On the long side of a skewed distribution, more than the normal share lies beyond ``z``.  There, the quantile gets
    the first Cornish-Fisher correction.  Without it, the verdict "worse" would be too frequent if few examples change.
    """
    # 1. Mean, variance and third moment of the average under the tilted rates.
    n, weights = changes.n, changes.weights
    falls, rises = tilted_rates(changes, side * tilt)
    mean, changed = rises - falls, rises + falls
    variance = (weights**2 * (changed - mean**2) / n).sum(-1)
    third = (weights**3 * mean * (1 - 3 * changed + 2 * mean**2) / n**2).sum(-1)
    # 2. The distance in standard errors, and the quantile.
    has_variance = variance > 0
    variance = np.where(has_variance, variance, 1.0)
    distance = side * ((weights * mean).sum(-1) - changes.average) / np.sqrt(variance)
    long_side = np.maximum(-side * third / variance**1.5, 0)
    return np.asarray(has_variance & (distance >= z + long_side * (z**2 - 1) / 6))


def tilted_rates(changes: Changes, tilt: Numbers) -> tuple[Numbers, Numbers]:
    """Return each task's rates p of falls and q of rises, [... tasks], under ``tilt`` [...].

    These rates maximise the log-likelihood plus ``t * (q - p)``, with t = ``tilt * weights``.  At the maximum,
    q = won / (m - t) and p = lost / (m + t), and the rate of no change is (n - lost - won) / m.  The three rates add up
    to 1, so m is the largest root of a cubic.  The rate that the tilt raises is 1 minus the other two, also if its
    count is 0.
    """
    lost, won, n, t = np.broadcast_arrays(changes.lost, changes.won, changes.n, changes.weights * tilt[..., None])
    same, size = n - lost - won, np.abs(t)
    # 1. The largest root of m^3 - n m^2 + b m + c, by cosines: all three are real.
    b, c = t * (lost - won) - t**2, same * t**2
    p = np.maximum(n**2 - 3 * b, 0) / 9
    q = (-2 * n**3 + 9 * n * b + 27 * c) / 54
    cosine = np.clip(q / np.maximum(p, 1e-300) ** 1.5, -1, 1)
    m = n / 3 - 2 * np.sqrt(p) * np.cos((np.arccos(cosine) + 2 * np.pi) / 3)
    m = np.maximum(m, size)
    # 2. The rate that the tilt lowers, that of no change, and the rest.
    unchanged = same / m
    lowered = np.where(t < 0, won, lost) / (m + size)
    raised = np.clip(1 - unchanged - lowered, 0, 1)
    return np.where(t < 0, raised, lowered), np.where(t < 0, lowered, raised)
