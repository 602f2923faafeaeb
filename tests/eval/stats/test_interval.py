"""The interval behind a verdict: published values, a numerical maximisation, and simulated coverage."""

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from eval.stats.compare import Z
from eval.stats.interval import Changes, count_changes, score_interval, tilted_rates
from tests.eval.stats.simulation import Rates, changes, draw_counts, true_difference


def one_task(lost: float, won: float, n: float) -> Changes:
    return changes(np.array([[lost, won]], float), [n])


def test_interval_of_one_task_is_tangos():
    """Airway reactivity before and after a transplant: 7 fell, 1 rose of 21 (Fagerland et al., BMC MRM 14, 2014).

    The correction for skewness moves the lower end further out than Tango's.
    """
    low, high = score_interval(one_task(7, 1, 21), 1.959964)
    assert high == pytest.approx(-0.026, abs=5e-4) and -0.527 < low <= -0.517


@pytest.mark.parametrize("n", [29, 50, 1009])
@pytest.mark.parametrize("z", [Z, 2.8])
def test_no_change_leaves_a_width(n, z):
    """The end is z^2 / (n + z^2), as in Wilson's interval: a rate p that is z standard errors from 0."""
    rate = z**2 / (n + z**2)
    assert score_interval(one_task(0, 0, n), z) == (pytest.approx(-rate), pytest.approx(rate))


def test_ends_are_mirrored_and_bounded():
    low, high = score_interval(one_task(11, 3, 101), Z)
    assert score_interval(one_task(3, 11, 101), Z) == (pytest.approx(-high), pytest.approx(-low))
    low, high = score_interval(one_task(53, 0, 53), Z)
    assert low == pytest.approx(-1) and -0.95 < high < -0.8


@pytest.mark.parametrize("tilt", [-400.0, -90.0, -3.0, 5.0, 61.0, 300.0])
def test_tilted_rates_are_the_most_likely_ones(tilt):
    """They equal scipy's constrained maximum of the likelihood, for tasks with and without changes."""
    for lost, won, n in ((3, 5, 101), (0, 4, 53), (7, 0, 31), (0, 0, 19)):
        task = one_task(lost, won, n)
        (fall,), (rise,) = tilted_rates(task, np.asarray(tilt))

        def log_likelihood(x, counts=(lost, won, n - lost - won)):
            rates = np.maximum([x[0], x[1], 1 - x[0] - x[1]], 1e-300)
            return sum(count * np.log(rate) for count, rate in zip(counts, rates, strict=True) if count)

        constraints = [LinearConstraint([1, 1], 0, 1 - 1e-9), LinearConstraint([-1, 1], rise - fall, rise - fall)]
        best = minimize(
            lambda x: -log_likelihood(x), (fall, rise), bounds=[(0, 1)] * 2, constraints=constraints, method="SLSQP"
        )
        assert log_likelihood((fall, rise)) >= -best.fun - 1e-6


def test_average_of_equal_tasks_is_nearly_one_task_of_all_examples():
    counts = np.array([[3.0, 5.0]] * 4)
    together = score_interval(changes(counts.sum(0)[None], [404]), Z)
    assert np.allclose(score_interval(changes(counts, [101] * 4), Z), np.ravel(together), atol=1e-4, rtol=0)


def test_small_changes_count_by_size():
    """If every change is half as large, the interval is half as wide, except at the end that no outcome reached."""
    whole = np.array([-1.0] * 7 + [1.0] * 4 + [0.0] * 90)
    ends = score_interval(count_changes([whole]), Z)
    assert score_interval(count_changes([whole / 2]), Z) == pytest.approx(np.divide(ends, 2))
    mixed = count_changes([np.array([-0.2, 0.4, 0.1, 0, 0, 0.0])])
    assert mixed.average == pytest.approx(0.05)
    assert (mixed.weights**2 * (mixed.lost + mixed.won)).sum() == pytest.approx(0.04 + 0.16 + 0.01)


@pytest.mark.parametrize(
    ("n", "rates"),
    [
        ([50], [(0.1, 0.06)]),
        ([50], [(0.05, 0.06)]),
        ([101], [(0.04, 0.02)]),
        ([211], [(0.02, 0.01)]),
        ([1009], [(0.01, 0.0)]),
        ([50] * 7, [(0.02, 0.01)] * 7),
        ([50] * 7, [(0.005, 0.005)] * 7),
        ([200] * 7, [(0.01, 0.0)] * 7),
        ([101, 503, 211], [(0.1, 0.05), (0.02, 0.02), (0.1, 0.2)]),
        ([2000, 500, 100, 50], [(0.03, 0.02), (0.05, 0.05), (0.06, 0.08), (0.08, 0.03)]),
    ],
)
def test_interval_covers_the_true_difference_in_95_percent(n, rates):
    """This holds from about five expected changes on, even if only losses occur."""
    covered, too_high = coverage(n, rates)
    assert 0.93 <= covered <= 0.97
    assert too_high <= 0.035, "wrong verdicts of no worse"


@pytest.mark.parametrize(("n", "rate"), [(50, 0.005), (50, 0.03), (101, 0.01), (499, 0.001), (499, 0.005)])
def test_interval_of_very_few_changes_covers_no_less(n, rate):
    """With fewer expected changes, outcomes have so few values that no interval can cover close to 95 %."""
    assert coverage([n], [(rate, rate / 2)])[0] >= 0.94


def coverage(n: list[int], rates: Rates, runs: int = 1500) -> tuple[float, float]:
    """Return how often the interval covers the true difference, and how often it lies above it."""
    counts = draw_counts(np.random.default_rng(7), n, rates, runs)
    low, high = score_interval(changes(counts, n), Z)
    truth = true_difference(rates)
    return float(np.mean((low <= truth) & (truth <= high))), float(np.mean(low > truth))
