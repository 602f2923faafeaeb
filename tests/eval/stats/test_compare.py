"""Paired statistics: figures of a comparison, tests against scipy, verdicts near their limits."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp, ttest_ind

from eval.stats.compare import Z, compare, compare_margins, compare_perplexity, is_near_chance, mcnemar
from eval.stats.interval import count_changes, score_interval
from eval.stats.sequential import Z_SEQUENTIAL


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


def test_figures_are_means_and_the_interval_that_decides():
    base, other = draw(np.random.default_rng(3), 401, 0.1, 0.04)
    result = compare([(base, other)])
    low, high = score_interval(count_changes([other - base]), Z)
    assert (result.low, result.high) == (low, high)
    assert result.difference == pytest.approx((other - base).mean(), abs=1e-12)
    assert (result.baseline, result.accuracy) == pytest.approx((base.mean(), other.mean()))


@pytest.mark.parametrize("drop", [0.001, 0.01, 0.05])
def test_verdict_is_that_of_the_printed_interval(drop):
    """This also holds with a small task in which no example changes."""
    random = np.random.default_rng(23)
    for _ in range(20):
        tasks = [draw(random, n, 0.03, 0.02) for n in (211, 307)] + [outcomes(20, 0, 0)]
        result = compare(tasks, allowed_drop=drop)
        expected = "no worse" if result.low > -drop else "worse" if result.high < -drop else "undecided"
        assert result.verdict == expected


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
    assert not result.needed or result.needed[0] > result.n


def test_allowed_drop_changes_the_verdict():
    pair = outcomes(1009, 60, 20)
    assert [compare([pair], allowed_drop=d).verdict for d in (0.001, 0.036, 0.2)] == ["worse", "undecided", "no worse"]


def test_tasks_of_all_sizes_have_the_same_weight():
    result = compare([outcomes(11, 0, 2), outcomes(1000, 13, 0)])
    assert result.difference == pytest.approx((2 / 13 - 13 / 1013) / 2)
    assert (result.n, result.lost, result.won) == (13 + 1013, 13, 2)


def test_sequential_comparison_has_a_wider_interval_and_no_p_value():
    """A p-value is not valid if the number of examples depended on the outcomes."""
    pair = outcomes(1009, 97, 51)
    single, sequential = compare([pair]), compare([pair], z=Z_SEQUENTIAL)
    assert sequential.low < single.low and single.high < sequential.high
    assert single.p_mcnemar and sequential.p_mcnemar is None


def test_sets_that_end_cannot_decide():
    result = compare([outcomes(101, 3, 3)], available=[107])
    assert (result.verdict, result.needed) == ("undecided", None)


@pytest.mark.parametrize(("right", "near"), [(30, True), (25, True), (20, True), (60, False)])
def test_near_chance(right, near):
    values = [1.0] * right + [0.0] * (101 - right)
    assert is_near_chance(values, 0.25) is near


@pytest.mark.parametrize("values", [[0.25, 0.2], [0.1] * 5, [0.0] * 40 + [0.01]], ids=len)
def test_any_share_above_a_chance_of_zero_is_better_than_guessing(values):
    assert not is_near_chance(values, 0.0) and is_near_chance([0.0] * len(values), 0.0)


def test_guessed_shares_are_near_chance_in_95_percent():
    """Coreference scores shares of five words; outcomes of whole answers vary more than these."""
    random = np.random.default_rng(2)
    runs = [[random.binomial(5, 0.25) / 5 for _ in range(7)] for _ in range(200)]
    assert sum(is_near_chance(values, 0.25) for values in runs) >= 190
    assert not is_near_chance([0.8] * 7, 0.25)


def test_near_chance_does_not_depend_on_the_number_of_examples():
    """Only the first 200 count: 30 % right are near chance for 200 examples, but would not be for 2,000."""
    values = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0] * 200
    assert is_near_chance(values[:200], 0.25) and is_near_chance(values, 0.25)
    assert not is_near_chance([1.0] * 200 + [0.0] * 2000, 0.25)


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


def test_margins_have_welchs_interval():
    """For one task it is scipy's interval of a mean; for two, half of its interval of a difference of means."""
    random = np.random.default_rng(8)
    one, other = random.normal(0.3, 1, 41), random.normal(-0.1, 2, 23)
    zeros = [0.0] * 41
    result = compare_margins([(zeros, one)])
    assert (result.low, result.high) == pytest.approx(tuple(ttest_1samp(one, 0).confidence_interval(0.95)))
    result = compare_margins([(zeros, one), (zeros[:23], other)])
    theirs = ttest_ind(one, -other, equal_var=False).confidence_interval(0.95)
    assert (2 * result.low, 2 * result.high) == pytest.approx((theirs.low, theirs.high))
    assert (result.n, result.difference) == (64, pytest.approx((one.mean() + other.mean()) / 2))


def test_margins_of_few_or_equal_examples():
    few = compare_margins([([0.0] * 9, [0.5] * 9)])
    assert (few.difference, few.low, few.high) == (0.5, None, None)
    same = compare_margins([([0.25] * 11, [0.25] * 11)])
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("tasks", [3, 6, 7])
@pytest.mark.parametrize("change", [-1.0, 0.3])
def test_interval_includes_the_difference_whatever_the_rounding(tasks, change):
    base = 0.5 - change / 2
    comparison = compare([([base], [base + change])] * tasks)
    assert comparison.low <= comparison.difference <= comparison.high
