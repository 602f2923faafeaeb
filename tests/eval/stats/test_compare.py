"""Paired statistics: intervals against simulation, tests against scipy, verdicts near their limits."""

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from eval.stats.compare import Comparison, compare, compare_perplexity, is_near_chance, mcnemar


def outcomes(both: int, lost: int, won: int, neither: int = 0) -> tuple[list[float], list[float]]:
    base = [1] * both + [1] * lost + [0] * won + [0] * neither
    other = [1] * both + [0] * lost + [1] * won + [0] * neither
    return [float(x) for x in base], [float(x) for x in other]


def draw(random: np.random.Generator, n: int, lost: float, won: float) -> tuple[np.ndarray, np.ndarray]:
    """Random outcomes of ``n`` examples, half of them correct by the baseline; the true difference is won - lost."""
    u = random.random(n)
    base = ((u < lost) | (u > 0.5 + (lost + won) / 2)).astype(float)
    changed = u < lost + won
    return base, np.where(changed, 1 - base, base)


@pytest.mark.parametrize(("n", "lost", "won"), [(211, 0.1, 0.06), (401, 0.04, 0.05)])
def test_interval_covers_the_true_difference_in_95_percent(n, lost, won):
    random = np.random.default_rng(7)
    covered, runs = 0, 1000
    for i in range(runs):
        result = compare([draw(random, n, lost, won)], resamples=500, seed=i)
        covered += result.low <= won - lost <= result.high
    assert 0.93 <= covered / runs <= 0.97


def test_interval_of_an_average_covers_the_true_difference_in_95_percent():
    """Tasks of different sizes and differences have the same weight."""
    random = np.random.default_rng(11)
    truth = np.mean([0.05 - 0.1, 0.02 - 0.02, 0.2 - 0.1])
    covered, runs = 0, 500
    for i in range(runs):
        tasks = [draw(random, 101, 0.1, 0.05), draw(random, 503, 0.02, 0.02), draw(random, 211, 0.1, 0.2)]
        result = compare(tasks, resamples=500, seed=i)
        covered += result.low <= truth <= result.high
    assert 0.93 <= covered / runs <= 0.97


def test_true_drop_at_the_limit_is_rarely_judged():
    """With a true drop equal to the allowed one, each verdict is wrong in about 2.5 %, the interval's side."""
    random = np.random.default_rng(13)
    verdicts = [compare([draw(random, 307, 0.05, 0.04)], resamples=500, seed=i).verdict for i in range(1000)]
    assert verdicts.count("no worse") / 1000 < 0.035
    assert verdicts.count("worse") / 1000 < 0.035


def test_sign_flip_tests_the_average_of_tasks():
    """A large task that loses does not make a gain of the average significant."""
    result = compare([outcomes(11, 0, 2), outcomes(1000, 13, 0)])
    assert result.difference > 0 and result.p_mcnemar > 0.1
    result = compare([outcomes(50, 2, 30), outcomes(1000, 13, 0)])
    assert result.p_mcnemar < 0.001


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (5, 2), (19, 7)])
def test_same_task_twice_gives_the_test_of_twice_the_examples(lost, won):
    one = outcomes(31, lost, won, 11)
    assert compare([one, one], resamples=40_000).p_mcnemar == pytest.approx(mcnemar(2 * lost, 2 * won), abs=0.01)


def test_outcomes_that_are_shares_count_by_size():
    """Many small losses do not outweigh few large gains."""
    base = [0.5] * 60
    other = [0.5 - 1e-7] * 45 + [0.9] * 15
    assert compare([(base, other)]).p_mcnemar < 0.001


def test_bootstrap_interval_equals_scipys():
    base, other = draw(np.random.default_rng(3), 401, 0.1, 0.04)
    result = compare([(base, other)], resamples=20_000)
    theirs = bootstrap((other - base,), np.mean, n_resamples=20_000, method="percentile", rng=5).confidence_interval
    assert result.low == pytest.approx(theirs.low, abs=0.0026) and result.high == pytest.approx(theirs.high, abs=0.0026)
    assert result.difference == pytest.approx((other - base).mean(), abs=1e-12)
    assert (result.baseline, result.accuracy) == pytest.approx((base.mean(), other.mean()))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (3, 11), (29, 17), (1, 1)])
def test_mcnemar_equals_the_exact_binomial_test(lost, won):
    """Against the sum of binomial probabilities."""
    from math import comb

    n = lost + won
    tail = sum(comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))
    assert compare([outcomes(7, lost, won, 3)]).p_mcnemar == pytest.approx(mcnemar(lost, won))


def test_mcnemar_of_many_examples_is_near_chi_square():
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
        (outcomes(19, 0, 0), "undecided"),  # no difference, but few examples
        (outcomes(200_000, 1000, 1000), "no worse"),
    ],
)
def test_verdict(pair, verdict):
    result = compare([pair])
    assert result.verdict == verdict
    assert (result.needed is None) == (verdict != "undecided")


def test_allowed_drop_changes_the_verdict():
    pair = outcomes(1009, 60, 20)
    assert [compare([pair], allowed_drop=d).verdict for d in (0.001, 0.036, 0.2)] == ["worse", "undecided", "no worse"]


@pytest.mark.parametrize("pair", [outcomes(101, 3, 3), outcomes(101, 8, 2), outcomes(307, 5, 6, 91)])
def test_needed_examples_decide_and_fewer_do_not(pair):
    result = compare([pair])
    assert result.verdict == "undecided" and result.needed

    def compare_scaled(n: float) -> Comparison:
        """Compare about ``n`` examples with the same shares of outcomes."""
        times = n / result.n
        kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
        counts = [sum((a, b) == kind for a, b in zip(*pair, strict=True)) for kind in kinds]
        both, lost, won, neither = (round(count * times) for count in counts)
        return compare([outcomes(both, lost, won, neither)])

    assert compare_scaled(1.15 * result.needed).verdict != "undecided"
    assert compare_scaled(0.8 * result.needed).verdict == "undecided"


def test_no_number_of_examples_decides_a_difference_at_the_limit():
    result = compare([outcomes(197, 2, 0, 1)])
    assert result.verdict == "undecided" and result.needed is None


def test_tasks_of_all_sizes_have_the_same_weight():
    result = compare([outcomes(11, 0, 2), outcomes(1000, 13, 0)])
    assert result.difference == pytest.approx((2 / 13 - 13 / 1013) / 2)
    assert (result.n, result.lost, result.won) == (13 + 1013, 13, 2)


def test_interval_depends_on_the_seed_alone():
    pair = outcomes(1009, 97, 51)
    assert compare([pair], seed=3) == compare([pair], seed=3)
    assert compare([pair], seed=3) != compare([pair], seed=4)


@pytest.mark.parametrize(("right", "near"), [(30, True), (25, True), (20, True), (60, False)])
def test_near_chance(right, near):
    assert is_near_chance([1.0] * right + [0.0] * (101 - right), 0.25) is near


def test_perplexity_of_few_texts_has_no_interval():
    result = compare_perplexity([-30.0] * 9, [-33.0] * 9, [10.0] * 9)
    assert (result.ratio, result.low, result.high) == (pytest.approx(np.exp(0.3)), None, None)
    assert compare_perplexity([-30.0] * 10, [-33.0] * 10, [10.0] * 10).low == pytest.approx(result.ratio)


def test_perplexity_beyond_a_float_is_infinite():
    """800 nats a word: a random model of bytes on text with long words."""
    result = compare_perplexity([-8000.0] * 11, [-16100.0] * 11, [10.0] * 11)
    assert (result.baseline, result.perplexity, result.ratio, result.low) == (np.inf,) * 4


def test_perplexity_and_its_ratio():
    random = np.random.default_rng(5)
    words = random.integers(50, 500, 61).astype(float)
    base = -3.0 * words + random.normal(0, 5, 61)
    other = base - 0.1 * words
    result = compare_perplexity(base, other, words)
    assert result.baseline == pytest.approx(np.exp(-base.sum() / words.sum()))
    assert result.perplexity == pytest.approx(np.exp(-other.sum() / words.sum()))
    assert (result.ratio, result.low, result.high) == pytest.approx((np.exp(0.1),) * 3)
    noisy = compare_perplexity(base, other + random.normal(0, 20, 61), words)
    assert noisy.low < noisy.ratio < noisy.high
