"""Tokens of conversation turns: appended turn by turn, they equal the chat template of the whole conversation."""

import pytest

from longctx.data.turns import turn_tokens
from longctx.hf.config import tokenizer_of


@pytest.mark.parametrize("ended", [True, False])
def test_turns_concatenate_to_the_whole_template(smollm2, ended):
    """The answer ended with its end token, or was cut at the maximum number of tokens."""
    tokenizer = tokenizer_of(smollm2[1])
    ends = (tokenizer.eos_token_id,)
    first = turn_tokens("What is a debugger?", tokenizer, before=[], ends=ends)
    answer = tokenizer("A tool.", add_special_tokens=False)["input_ids"] + [ends[0]] * ended
    second = turn_tokens("And a profiler?", tokenizer, before=first + answer, ends=ends)
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "What is a debugger?"},
            {"role": "assistant", "content": "A tool."},
            {"role": "user", "content": "And a profiler?"},
        ],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert first + answer + second == list(whole)
