"""A conversation's words, as the model's chat template puts them: what is new of a turn continues what was."""

import pytest

from longctx.data.turns import turn_tokens
from longctx.hf.config import tokenizer_of


@pytest.mark.parametrize("ended", [True, False])
def test_turns_add_up_to_the_template(smollm2, ended):
    """Whether the answer ended by itself, or was cut at its number of tokens."""
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
