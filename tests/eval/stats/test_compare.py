"""Paired statistics: intervals against simulation, tests against scipy, verdicts at their edges."""

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from eval.stats.compare import Comparison, compare, compare_perplexity, mcnemar, near_chance


def outcomes(both: int, lost: int, won: int, neither: int = 0) -> tuple[list[float], list[float]]:
    base = [1] * both + [1] * lost + [0] * won + [0] * neither
    other = [1] * both + [0] * lost + [1] * won + [0] * neither
    return [float(x) for x in base], [float(x) for x in other]


def draw(random: np.random.Generator, n: int, lost: float, won: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of ``n`` examples, half of which the baseline gets right; the true difference is won - lost."""
    u = random.random(n)
    base = ((u < lost) | (u > 0.5 + (lost + won) / 2)).astype(float)
    changed = u < lost + won
    return base, np.where(changed, 1 - base, base)


@pytest.mark.parametrize(("n", "lost", "won"), [(211, 0.1, 0.06), (401, 0.04, 0.05)])
def test_the_interval_covers_the_truth_as_often_as_it_says(n, lost, won):
    random = np.random.default_rng(7)
    covered, runs = 0, 1000
    for i in range(runs):
        made = compare([draw(random, n, lost, won)], resamples=500, seed=i)
        covered += made.low <= won - lost <= made.high
    assert 0.93 <= covered / runs <= 0.97


def test_the_average_of_tasks_covers_the_truth_too():
    """Of different sizes and differences, each weighing the same."""
    random = np.random.default_rng(11)
    truth = np.mean([0.05 - 0.1, 0.02 - 0.02, 0.2 - 0.1])
    covered, runs = 0, 500
    for i in range(runs):
        tasks = [draw(random, 101, 0.1, 0.05), draw(random, 503, 0.02, 0.02), draw(random, 211, 0.1, 0.2)]
        made = compare(tasks, resamples=500, seed=i)
        covered += made.low <= truth <= made.high
    assert 0.93 <= covered / runs <= 0.97


def test_a_model_that_is_too_bad_is_seldom_called_no_worse():
    """At a true drop of exactly what is allowed: at most one in forty, each side of the interval having 2.5 %."""
    random = np.random.default_rng(13)
    verdicts = [compare([draw(random, 307, 0.05, 0.04)], resamples=500, seed=i).verdict for i in range(1000)]
    assert verdicts.count("no worse") / 1000 < 0.035
    assert verdicts.count("worse") / 1000 < 0.035


def test_of_an_average_it_is_the_average_that_is_tested():
    """A large task that loses does not make a gain of the average significant."""
    made = compare([outcomes(11, 0, 2), outcomes(1000, 13, 0)])
    assert made.difference > 0 and made.p_mcnemar > 0.1
    made = compare([outcomes(50, 2, 30), outcomes(1000, 13, 0)])
    assert made.p_mcnemar < 0.001


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (5, 2), (19, 7)])
def test_twice_the_same_task_is_that_task(lost, won):
    """Its p-value is of twice as many examples."""
    one = outcomes(31, lost, won, 11)
    assert compare([one, one], resamples=40_000).p_mcnemar == pytest.approx(mcnemar(2 * lost, 2 * won), abs=0.01)


def test_outcomes_that_are_shares_are_weighed():
    """Roundings that fall often do not outweigh what rises much."""
    base = [0.5] * 60
    other = [0.5 - 1e-7] * 45 + [0.9] * 15
    assert compare([(base, other)]).p_mcnemar < 0.001


def test_the_bootstrap_is_scipys():
    base, other = draw(np.random.default_rng(3), 401, 0.1, 0.04)
    made = compare([(base, other)], resamples=20_000)
    theirs = bootstrap((other - base,), np.mean, n_resamples=20_000, method="percentile", rng=5).confidence_interval
    assert made.low == pytest.approx(theirs.low, abs=0.0026) and made.high == pytest.approx(theirs.high, abs=0.0026)
    assert made.difference == pytest.approx((other - base).mean(), abs=1e-12)
    assert (made.baseline, made.accuracy) == pytest.approx((base.mean(), other.mean()))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (3, 11), (29, 17), (1, 1)])
def test_mcnemar_is_exact(lost, won):
    """By hand from binomial probabilities, and as scipy's sign test of the same table."""
    from math import comb

    n = lost + won
    tail = sum(comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))
    assert compare([outcomes(7, lost, won, 3)]).p_mcnemar == pytest.approx(mcnemar(lost, won))


def test_mcnemar_agrees_with_the_chi_square_approximation_of_many():
    lost, won = 210, 160
    chi = (abs(lost - won) - 1) ** 2 / (lost + won)
    assert mcnemar(lost, won) == pytest.approx(2 * norm.sf(np.sqrt(chi)), rel=0.02)


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (outcomes(1009, 0, 0), "no worse"),
        (outcomes(1009, 0, 97), "no worse"),
        (outcomes(1009, 97, 0), "worse"),
        (outcomes(101, 3, 3), "undecided"),
        (outcomes(19, 0, 0), "undecided"),  # all alike, but few
        (outcomes(200_000, 1000, 1000), "no worse"),
    ],
)
def test_verdicts(pair, verdict):
    made = compare([pair])
    assert made.verdict == verdict
    assert (made.needed is None) == (verdict != "undecided")


def test_what_is_allowed_decides():
    pair = outcomes(1009, 60, 20)
    assert [compare([pair], allowed_drop=d).verdict for d in (0.001, 0.036, 0.2)] == ["worse", "undecided", "no worse"]


@pytest.mark.parametrize("pair", [outcomes(101, 3, 3), outcomes(101, 8, 2), outcomes(307, 5, 6, 91)])
def test_as_many_examples_as_are_said_to_be_needed_decide(pair):
    made = compare([pair])
    assert made.verdict == "undecided" and made.needed

    def of(n: float) -> Comparison:
        """The same shares of outcomes, of about ``n`` examples."""
        times = n / made.n
        kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
        counts = [sum((a, b) == kind for a, b in zip(*pair, strict=True)) for kind in kinds]
        both, lost, won, neither = (round(count * times) for count in counts)
        return compare([outcomes(both, lost, won, neither)])

    assert of(1.15 * made.needed).verdict != "undecided"
    assert of(0.8 * made.needed).verdict == "undecided"


def test_a_difference_at_the_limit_is_out_of_reach():
    made = compare([outcomes(197, 2, 0, 1)])
    assert made.verdict == "undecided" and made.needed is None


def test_tasks_weigh_the_same_whatever_their_size():
    made = compare([outcomes(11, 0, 2), outcomes(1000, 13, 0)])
    assert made.difference == pytest.approx((2 / 13 - 13 / 1013) / 2)
    assert (made.n, made.lost, made.won) == (13 + 1013, 13, 2)


def test_seeded():
    pair = outcomes(1009, 97, 51)
    assert compare([pair], seed=3) == compare([pair], seed=3)
    assert compare([pair], seed=3) != compare([pair], seed=4)


@pytest.mark.parametrize(("right", "near"), [(30, True), (25, True), (20, True), (60, False)])
def test_near_chance(right, near):
    assert near_chance([1.0] * right + [0.0] * (101 - right), 0.25) is near


def test_of_few_texts_a_perplexity_has_no_interval():
    made = compare_perplexity([-30.0] * 9, [-33.0] * 9, [10.0] * 9)
    assert (made.ratio, made.low, made.high) == (pytest.approx(np.exp(0.3)), None, None)
    assert compare_perplexity([-30.0] * 10, [-33.0] * 10, [10.0] * 10).low == pytest.approx(made.ratio)


def test_perplexity():
    random = np.random.default_rng(5)
    words = random.integers(50, 500, 61).astype(float)
    base = -3.0 * words + random.normal(0, 5, 61)
    other = base - 0.1 * words
    made = compare_perplexity(base, other, words)
    assert made.baseline == pytest.approx(np.exp(-base.sum() / words.sum()))
    assert made.perplexity == pytest.approx(np.exp(-other.sum() / words.sum()))
    assert (made.ratio, made.low, made.high) == pytest.approx((np.exp(0.1),) * 3)
    noisy = compare_perplexity(base, other + random.normal(0, 20, 61), words)
    assert noisy.low < noisy.ratio < noisy.high
