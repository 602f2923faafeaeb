"""Cells of the report: a difference and its interval, as printed, have the verdict."""

import re

import pytest

from eval.stats.compare import compare
from eval.stats.page import _difference


@pytest.mark.parametrize(
    ("lost", "won", "n", "digits"), [(13, 8, 1500, 4), (14, 10, 1500, 4), (3, 2, 20_000, 5), (0, 0, 200, 3)]
)
def test_interval_as_printed_has_the_verdict(lost, won, n, digits):
    """Three decimals would print the first two as -0.003 [-0.010, ...]; with the third, -0.000 [-0.000, +0.000]."""
    same = [1.0] * (n - lost - won)
    compared = compare([([1.0] * lost + [0.0] * won + same, [0.0] * lost + [1.0] * won + same)])
    cell = _difference(vars(compared), 0.01)
    words = re.fullmatch(r"([+-][0-9.]+) \[([+-][0-9.]+), ([+-][0-9.]+)\]", cell).groups()
    difference, low, high = map(float, words)
    assert {len(word.partition(".")[2]) for word in words} == {digits}
    assert (difference != 0) == (lost != won) and (low, high) == pytest.approx((compared.low, compared.high), abs=1e-3)
    assert compared.verdict == ("no worse" if low > -0.01 else "worse" if high < -0.01 else "undecided")


def test_three_digits_become_four_where_the_verdict_needs_them():
    """1,000 examples have three decimals, unless an end that is above the limit would be printed as the limit."""
    cells = {}
    for low in (-0.0096, -0.0104, -0.008):
        cells[low] = _difference({"n": 1000, "difference": -1e-9, "low": low, "high": 0.004}, 0.01)
    assert cells == {
        -0.0096: "+0.0000 [-0.0096, +0.0040]", -0.0104: "+0.000 [-0.010, +0.004]", -0.008: "+0.000 [-0.008, +0.004]"
    }  # fmt: skip
