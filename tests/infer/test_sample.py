"""Sampled tokens follow the probabilities that transformers' processors leave, and are the same on every rank."""

from collections import Counter
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longctx.config import Sampling
from longctx.infer.sample import choose_token, penalize, rank_candidates, token_logprob

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
    with pytest.raises(ValueError, match="after position 3: the logits are NaN or infinite"):
        choose_token(torch.tensor([1.0, bad, 2.0]), Sampling(temperature), 3)


VOCAB = 101
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=17)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 999),
    prompt=tokens,
    answer=tokens,
    changes=st.fixed_dictionaries({
        "temperature": st.sampled_from([0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 7, 40, 500]),
        "top_p": st.sampled_from([0.2, 0.77, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.9]),
        "presence_penalty": st.sampled_from([-1.5, 0.0, 0.6]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 2.0]),
    }),
)  # fmt: skip
def test_probabilities_are_those_of_transformers_processors(seed, prompt, answer, changes):
    """Presence and frequency penalties, which transformers lacks, follow the formula of OpenAI's API reference."""
    sampling = Sampling(**changes)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 3
    processors = LogitsProcessorList(
        [
            TemperatureLogitsWarper(sampling.temperature),
            *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
            TopPLogitsWarper(sampling.top_p),
            MinPLogitsWarper(sampling.min_p),
        ]
    )
    ids = torch.tensor([prompt + answer])
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, logits[None].clone())
    for j in range(VOCAB):
        scores[0, j] -= answer.count(j) * sampling.frequency_penalty
        scores[0, j] -= float(answer.count(j) > 0) * sampling.presence_penalty
    expected = processors(ids, scores).softmax(-1)[0]

    ranked, order = rank_candidates(penalize(logits, sampling, prompt, answer), sampling)
    probabilities = torch.zeros(VOCAB, dtype=torch.double).scatter(0, order, ranked / ranked.sum())
    torch.testing.assert_close(probabilities, expected, rtol=1e-12, atol=1e-15)


def test_greedy_takes_the_most_likely_token_after_penalties():
    sampling = Sampling(presence_penalty=1.0, frequency_penalty=0.5)
    assert choose_token(LOGITS, sampling, 3, prompt=[1, 1], answer=[]) == 1, "the prompt does not count"
    assert choose_token(LOGITS, sampling, 3, prompt=[], answer=[1]) == 3
    assert choose_token(LOGITS, Sampling(repetition_penalty=1.2), 3, prompt=[1], answer=[]) == 3


def test_logprobs_are_the_models_own():
    one = token_logprob(LOGITS, 4, 3)
    expected = torch.log_softmax(LOGITS.double(), -1)
    assert (one.token, one.logprob) == (4, float(expected[4]))
    assert one.top == tuple((token, float(expected[token])) for token in (1, 3, 4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 3}, r"top_k=3 has no effect at sampling.temperature=0.*or sampling.top_k=0$"),
        ({"min_p": 0.1}, r"min_p=0.1 has no effect"),
        ({"temperature": 1.0, "top_k": -1}, r"top_k=-1: use 0 to \d+; 0 keeps all tokens"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p=1.1: use 0 to 1,"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0: use 0.01 to 100; 1 is none"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1: use -2 to 2"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty=-2.1: use -2 to 2"),
        ({"logprobs": 21}, "logprobs=21: use 0 to 20"),
        ({"stop": ("a", "")}, "stop has an empty text"),
        ({"stop_tokens": (5, -1)}, "stop_tokens has -1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)
