"""Sampled tokens follow their probabilities, come from the nucleus, and are the same on every rank."""

from collections import Counter
from math import sqrt

import pytest
import torch

from longctx.config import Sampling
from longctx.infer.sample import choose_token

PROBABILITIES = torch.tensor([0.03, 0.41, 0.07, 0.29, 0.11, 0.09])
LOGITS = PROBABILITIES.log() + 17.0  # softmax ignores the shift
DRAWS = 1009


def count_draws(sampling: Sampling, logits: torch.Tensor = LOGITS) -> Counter[int]:
    return Counter(choose_token(logits, sampling, position) for position in range(DRAWS))


def assert_follows(counts: Counter[int], probabilities: torch.Tensor) -> None:
    """Assert that each count is within five standard deviations of its expectation, and 0 for probability 0."""
    for token, p in enumerate(probabilities.tolist()):
        assert abs(counts[token] - DRAWS * p) <= 5 * sqrt(DRAWS * p * (1 - p)), f"token {token}"


def test_greedy_takes_the_most_likely_token():
    assert set(count_draws(Sampling(temperature=0.0))) == {1}


def test_lowest_temperature_is_as_good_as_greedy():
    """Logits are divided by it: they stay finite."""
    with pytest.raises(ValueError, match=r"temperature=1e-320: use 0 for greedy, or 1e-6 or more"):
        Sampling(temperature=1e-320)
    assert set(count_draws(Sampling(temperature=1e-6))) == {1}


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_probabilities(temperature, seed):
    expected = PROBABILITIES.double() ** (1 / temperature)
    assert_follows(count_draws(Sampling(temperature, seed=seed)), expected / expected.sum())


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.001, [1]),  # the most likely token exceeds top_p alone, and stays
        (0.40, [1]),
        (0.42, [1, 3]),
        (0.75, [1, 3, 4]),
        (0.96, [1, 3, 4, 5, 2]),
        (0.98, [1, 3, 4, 5, 2, 0]),
    ],
)
def test_nucleus_is_the_fewest_most_likely_tokens_that_reach_top_p(top_p, nucleus):
    expected = torch.zeros_like(PROBABILITIES)
    expected[nucleus] = PROBABILITIES[nucleus] / PROBABILITIES[nucleus].sum()
    assert_follows(count_draws(Sampling(1.0, top_p)), expected)


def test_temperature_applies_before_the_nucleus_cut():
    hot = LOGITS * 3
    assert set(count_draws(Sampling(1.0, 0.6), hot)) == {1}
    assert set(count_draws(Sampling(3.0, 0.6), hot)) == {1, 3}


def test_only_seed_and_position_determine_the_draw():
    torch.manual_seed(1)
    flat, sampling = torch.zeros(997), Sampling(1.0, seed=5)
    first = [choose_token(flat, sampling, position) for position in range(13)]
    torch.manual_seed(2)
    again = [choose_token(flat, sampling, position) for position in reversed(range(13))]
    assert first == again[::-1]
    assert len(set(first)) > 1, "draws do not depend on the position"
    assert first != [choose_token(flat, Sampling(1.0, seed=6), position) for position in range(13)]


def test_sampling_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    choose_token(LOGITS, Sampling(1.0), 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_of_logits_works(dtype):
    assert choose_token(torch.tensor([-40.0, 40.0, -40.0], dtype=dtype), Sampling(1.0), 3) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_refused(temperature, bad):
    """argmax of NaN is a token like any other."""
    with pytest.raises(ValueError, match="position 3: the logits are NaN or infinite"):
        choose_token(torch.tensor([1.0, bad, 2.0]), Sampling(temperature), 3)
