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


@pytest.mark.parametrize(("sizes", "change"), [((980, 10, 10), -1 / 2940), ((99_980, 10, 10), -1 / 299_940)])
def test_one_changed_example_of_the_largest_task_is_not_printed_as_0(sizes, change):
    first, *others = ([1.0] * n for n in sizes)
    compared = compare([(first, [0.0, *first[1:]]), *((one, one) for one in others)])
    shown = _difference(vars(compared), 0.01).split()[0]
    assert shown.startswith("-0.000") and float(shown) == pytest.approx(change, rel=0.2)


def test_three_digits_become_four_where_the_verdict_needs_them():
    """1,000 examples have three decimals, unless an end that is above the limit would be printed as the limit."""
    cells = {}
    for low in (-0.0096, -0.0104, -0.008):
        cells[low] = _difference({"n": 1000, "difference": -1e-9, "low": low, "high": 0.004}, 0.01)
    assert cells == {
        -0.0096: "+0.0000 [-0.0096, +0.0040]", -0.0104: "+0.000 [-0.010, +0.004]", -0.008: "+0.000 [-0.008, +0.004]"
    }  # fmt: skip
