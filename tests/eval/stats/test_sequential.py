"""Repeated looks until a verdict: the error of all looks together, and the number of examples."""

import numpy as np
import pytest
from scipy.stats import norm

from eval.stats.compare import Z
from eval.stats.interval import score_interval
from eval.stats.sequential import GROWTH, LOOKS, Z_SEQUENTIAL, sizes_at
from tests.eval.stats.simulation import Rates, changes, draw_counts

DROP = 0.01
MANY = 10**6


def test_twenty_looks_together_leave_the_quantile_in_5_percent():
    """Integrate numerically the density of paths that stayed inside (Armitage, McPherson and Rowe, 1969)."""
    points, weights = np.polynomial.legendre.leggauss(400)
    at, weights = points * Z_SEQUENTIAL, weights * Z_SEQUENTIAL
    correlation = GROWTH**-0.5
    density = norm.pdf(at)
    step = norm.pdf(at[:, None], correlation * at, np.sqrt(1 - correlation**2)) * weights
    for _ in range(LOOKS - 1):
        density = step @ density
    assert 0.045 < 1 - weights @ density <= 0.05


def test_sizes_grow_to_the_end_of_each_set():
    available = {"a": 10**5, "b": 100, "c": 7}
    assert [sizes_at(step, available) for step in (0, 1, 5)] == [
        {"a": 100, "b": 100, "c": 7},
        {"a": 125, "b": 100, "c": 7},
        {"a": 305, "b": 100, "c": 7},
    ]
    assert sizes_at(LOOKS - 1, available)["a"] == 6939


def look_until_decided(rates: Rates, runs: int, available: int = MANY) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each run, the verdict (1: no worse, -1: worse, 0: none) and the examples that it took."""
    random, tasks = np.random.default_rng(5), len(rates)
    counts, sizes = np.zeros((runs, tasks, 2)), np.zeros(tasks, int)
    verdicts, used = np.zeros(runs), np.zeros(runs)
    for step in range(LOOKS):
        more = list(sizes_at(step, {str(task): available for task in range(tasks)}).values())
        counts += draw_counts(random, more - sizes, rates, runs)
        sizes, running = np.array(more), verdicts == 0
        used[running] = sizes.sum()
        low, high = score_interval(changes(counts[running], sizes), Z_SEQUENTIAL)
        verdicts[running] = (low > -DROP) * 1 - (high < -DROP) * 1
    return verdicts, used


@pytest.mark.parametrize("rates", [[(0.01, 0.0)], [(0.03, 0.02)] * 2, [(0.02, 0.01), (0.01, 0.0), (0.05, 0.04)]])
def test_verdicts_at_a_true_loss_of_the_allowed_drop_are_wrong_in_at_most_5_percent(rates):
    verdicts, _ = look_until_decided(rates, runs=1000)
    assert (verdicts == 1).mean() <= 0.03
    assert (verdicts != 0).mean() <= 0.05


def test_single_look_quantile_at_every_look_is_wrong_more_often(monkeypatch):
    monkeypatch.setattr("tests.eval.stats.test_sequential.Z_SEQUENTIAL", Z)
    verdicts, _ = look_until_decided([(0.03, 0.02)], runs=500)
    assert (verdicts != 0).mean() > 0.15


@pytest.mark.parametrize("rates", [[(0.015, 0.015)], [(0.02, 0.02)] * 3])
def test_no_loss_takes_at_most_30_percent_more_examples_than_a_test_of_fixed_size(rates):
    """At the fixed size, 80 % of tests say no worse; with looks until a verdict, nearly all do."""
    random, tasks = np.random.default_rng(3), len(rates)
    verdicts, used = look_until_decided(rates, runs=500)
    fixed = int(used.mean() / 1.3 / tasks)  # each task's examples, were the sequence exactly 30 % longer
    low, _ = score_interval(changes(draw_counts(random, [fixed] * tasks, rates, 2000), [fixed] * tasks), Z)
    assert (low > -DROP).mean() < 0.8, "so a fixed size needs more than used / 1.3"
    assert (verdicts == 1).mean() > 0.95
