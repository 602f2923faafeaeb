"""Perplexity of any loss."""

import math

import pytest

from longctx.perplexity import perplexity


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (1.0, math.e), (800.0, math.inf), (math.inf, math.inf)])
def test_perplexity_is_the_exponential_or_infinite(loss, expected):
    assert perplexity(loss) == expected


def test_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))
