"""Perplexity, the exponential of a mean loss, and the confidence interval of a ratio of perplexities."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[Any]


def perplexity(loss: float) -> float:
    """Return the exponential of ``loss`` (nats a token): inf if it is beyond a float, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:  # above 709 nats
        return math.inf


def difference_interval(
    base: Numbers, other: Numbers, lengths: Numbers, level: float = 0.95
) -> tuple[float, float, float]:
    """Return (difference, low, high): ``other``'s mean loss minus ``base``'s, and the interval at confidence ``level``.

    ``base`` and ``other`` have one sum of losses (nats) for each text, of the same texts; ``lengths`` has each text's
    number of tokens or words.  The difference is per token or word.  The exponentials of the three results are the
    ratio of perplexities and its interval.  With one text, low and high are infinite.  The interval is Student's for a
    ratio of means (Cochran, Sampling Techniques, 1977, 6.3).  It does not assume that losses within a text are
    independent.
    """
    from scipy.stats import t as student  # slow to import

    lengths_array = np.asarray(lengths, float)
    n = len(lengths_array)
    losses = np.asarray(other, float) - np.asarray(base, float)
    difference = float(losses.sum() / lengths_array.sum())
    if n < 2:
        return difference, -math.inf, math.inf
    spread = float(np.std(losses - difference * lengths_array, ddof=1)) / math.sqrt(n) / float(lengths_array.mean())
    half = float(student.ppf((1 + level) / 2, n - 1)) * spread
    return difference, difference - half, difference + half
