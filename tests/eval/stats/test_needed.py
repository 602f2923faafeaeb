"""The number of examples that leads to a verdict: simulations, and sets with a limited number of examples."""

import numpy as np

from eval.stats.compare import Z
from eval.stats.interval import Changes, score_interval
from eval.stats.needed import examples_needed
from tests.eval.stats.simulation import Rates, changes, draw_counts

DROP = 0.01


def needed(lost: float, won: float, n: int = 200, available: int | None = None) -> tuple[int, ...] | None:
    return examples_needed(changes(np.array([[lost, won]], float), [n]), [available], DROP, Z)


def decided_after_extension(n: list[int], rates: Rates, runs: int = 150) -> np.ndarray:
    """Extend undecided runs of ``n`` examples to the sizes of `examples_needed`; return which are then decided."""
    random, tasks = np.random.default_rng(17), len(n)
    first = draw_counts(random, n, rates, 4 * runs)
    low, high = score_interval(changes(first, n), Z)
    first = first[(low <= -DROP) & (high >= -DROP)][:runs]
    sizes = np.array([examples_needed(changes(counts, n), [None] * tasks, DROP, Z) for counts in first])
    more = [draw_counts(random, extra, rates, 1)[0] for extra in sizes - n]
    last = first + np.array(more)
    low, high = score_interval(Changes(last[..., 0], last[..., 1], sizes.astype(float), np.full(tasks, 1 / tasks)), Z)
    return (low > -DROP) | (high < -DROP)


def test_so_many_examples_decide_in_80_percent_of_cases():
    """The cases have no loss, or twice the allowed loss."""
    alike = [(0.015, 0.015), (0.02, 0.02), (0.01, 0.01)]
    lost = [(0.035, 0.015)] * 2
    decided = [
        decided_after_extension(*case)
        for case in (([200], alike[:1]), ([200] * 3, alike), ([1000], [(0.03, 0.03)]), ([200] * 2, lost))
    ]
    assert all(0.7 <= one.mean() <= 0.9 for one in decided)
    assert 0.75 <= np.mean(decided) <= 0.85


def test_more_are_needed_the_more_the_variant_lost_here():
    counts = [needed(lost, won)[0] for lost, won in ((2, 4), (3, 3), (4, 2))]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert needed(3, 3, n=100)[0] > 200


def test_sets_that_end_give_all_they_have():
    """A task of 100 examples gives 100, and the others give more; the total may still be too small."""
    n = [100, 100, 100]
    counts = np.array([[2.0, 2.0]] * 3)
    alike = examples_needed(changes(counts, n), [None] * 3, DROP, Z)
    assert len(set(alike)) == 1
    with_end = examples_needed(changes(counts, n), [100, None, 10**5], DROP, Z)
    assert with_end is None, "the spread of the small set alone is too wide"
    with_end = examples_needed(changes(counts, n), [alike[0] // 2, None, 10**5], DROP, Z)
    assert with_end[0] == alike[0] // 2 and with_end[1] == with_end[2] > alike[0]
    assert needed(3, 3, available=300) is None
    assert needed(3, 3, available=10**4) == needed(3, 3)


def test_allowed_drop_of_nothing_cannot_be_decided():
    assert examples_needed(changes(np.array([[3.0, 3.0]]), [200]), [None], 0.0, Z) is None
