"""Perplexity of any loss, and the interval of a difference of losses."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from longctx.perplexity import difference_interval, perplexity


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (1.0, math.e), (800.0, math.inf), (math.inf, math.inf)])
def test_perplexity_is_the_exponential_or_infinite(loss, expected):
    assert perplexity(loss) == expected


def test_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))


def test_difference_of_equally_long_texts_has_students_interval():
    random = np.random.default_rng(5)
    base = random.normal(700, 50, 19)
    other = base + random.normal(8, 5, 19)
    result = difference_interval(base, other, [256] * 19)
    theirs = ttest_1samp((other - base) / 256, 0).confidence_interval(0.95)
    assert result == pytest.approx(((other - base).sum() / 19 / 256, theirs.low, theirs.high))


def test_difference_of_unequal_texts_covers_in_95_percent():
    """Losses differ from text to text, and texts have 20 to 400 tokens."""
    random = np.random.default_rng(6)
    covered, runs = 0, 1000
    for _ in range(runs):
        lengths = random.integers(20, 400, 31)
        other = lengths * random.normal(0.05, 0.04, 31)
        _, low, high = difference_interval([0.0] * 31, other, lengths)
        covered += low <= 0.05 <= high
    assert 0.93 <= covered / runs <= 0.97


def test_one_text_has_no_interval():
    assert difference_interval([700.0], [707.0], [100]) == (0.07, -math.inf, math.inf)
