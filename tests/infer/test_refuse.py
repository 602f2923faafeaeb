"""Prompts that a session refuses."""

import pytest

from longctx.infer.refuse import refuse_prompts
from longctx.model_shape import ModelShape

SHAPE = ModelShape(1, 8, 2, 1, 4, 8, vocab_size=11, max_positions=13, norm_eps=1e-5, tied=True, qkv_bias=False)


@pytest.mark.parametrize(
    ("prompts", "limits", "words"),
    [
        ({}, {}, "no prompts"),
        ({2: []}, {2: 1}, "prompt of sequence 2 is empty"),
        ({2: [10, 11]}, {2: 1}, "prompt of sequence 2 has token 11, beyond the model's vocabulary of 11"),
        ({2: [10]}, {2: -1}, "max_new_tokens=-1 of sequence 2"),
        ({2: [0] * 5}, {2: 2}, r"sequence 2 would have 14 tokens \(7 so far, 5 new"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, limits, words):
    with pytest.raises(ValueError, match=words):
        refuse_prompts(SHAPE, {2: 7}, prompts, limits)


def test_prompts_up_to_the_last_position_and_token_are_accepted():
    refuse_prompts(SHAPE, {2: 7}, {2: [10] * 5, 3: [0] * 13}, {2: 1, 3: 0})
