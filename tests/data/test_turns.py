"""Tokens of conversation turns: appended turn by turn, they equal the chat template of the whole conversation."""

import pytest

from longctx.data.turns import turn_tokens, turns_from
from longctx.hf.config import tokenizer_of
from tests.data.test_conversations import GLM4, PHI3
from tests.tiny import tiny_tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# In the manner of gpt-oss: an answer ends with <eos>, and with <end> when messages follow.
GPT_OSS = (
    "{% for m in messages %}{{ '<start>' + m.role + ':' + m.content }}"
    "{{ '<eos>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant:' }}{% endif %}"
)
# Nothing closes a message, and ordinary text begins each.
PLAIN = "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + ' ' }}{% endfor %}"
# With a system text in each conversation: in the manner of Qwen 2.5, Llama 3.1 and GLM-4.
CHATML = (
    "{{ '<start>system\nHelp.<end>\n' }}"
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
LLAMA31 = CHATML.replace("{{ '<start>system", "{{ '<user><start>system").replace("<end>\n", "<end>")
GLM4_SYSTEM = "{{ '<start>\nHelp.' }}" + GLM4
# A token begins each message, and nothing closes one.
BEGUN = (
    "{{ '<start>system: Help.' }}{% for m in messages %}{{ '<start>' + m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant: ' }}{% endif %}"
)
ENDED = {  # template, end tokens, the answer, and the tokens to append after it
    "space before the end": (LLAMA2, ["<eos>"], "yes<eos>", "[INST] and? [/INST]"),
    "another end": (LLAMA2, ["<eos>", "<end>"], "yes<end>", "[INST] and? [/INST]"),
    "no end": (LLAMA2, ["<eos>"], "yes", " <eos>[INST] and? [/INST]"),
    "Phi-3": (PHI3, ["<eos>", "<end>"], "yes<eos>", "\n<user>\nand?<end>\n<assistant>\n"),
    "gpt-oss": (GPT_OSS, ["<eos>"], "yes<eos>", "<start>user:and?<end><start>assistant:"),
    "GLM-4": (GLM4, ["<eos>", "<user>"], "yes<user>", "\nand?<assistant>\n"),
    "GLM-4, another end": (GLM4, ["<eos>", "<user>"], "yes<eos>", "<user>\nand?<assistant>\n"),
    "GLM-4, a system text": (GLM4_SYSTEM, ["<eos>", "<user>"], "yes<eos>", "<user>\nand?<assistant>\n"),
    "ChatML": (CHATML, ["<end>", "<eos>"], "yes<end>", "\n<start>user\nand?<end>\n<start>assistant\n"),
    "ChatML, another end": (CHATML, ["<end>", "<eos>"], "yes<eos>", "\n<start>user\nand?<end>\n<start>assistant\n"),
    "Llama 3.1": (LLAMA31, ["<end>", "<eos>"], "yes<eos>", "<start>user\nand?<end><start>assistant\n"),
    "nothing closes a message": (BEGUN, ["<eos>"], "yes<eos>", "<start>user: and?<start>assistant: "),
    "a stop token": (PHI3, ["<eos>", "<end>"], "yes.", "<end>\n<user>\nand?<end>\n<assistant>\n"),
    "no end of a turn": (PLAIN, ["<eos>"], "yes<eos>", " ### user: and? "),
}


@pytest.mark.parametrize(("template", "ends", "answer", "new"), ENDED.values(), ids=ENDED)
def test_end_token_of_an_answer_is_not_doubled(template, ends, answer, new):
    special = ["<end>", "<user>", "<start>"]
    tokenizer = tiny_tokenizer(eos_token="<eos>", extra_special_tokens=special, chat_template=template)
    ids = tuple(tokenizer.convert_tokens_to_ids(ends))
    before = [*turn_tokens("hi", tokenizer, before=[], ends=ids), *tokenizer(answer)["input_ids"]]
    tokens = turn_tokens("and?", tokenizer, before=before, ends=ids, stops=tuple(b"."))
    assert tokenizer.decode(tokens) == new


def test_null_takes_the_default_number_of_tokens(tmp_path):
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello", "max_new_tokens": null}')
    assert turns_from(str(tmp_path / "turns.jsonl"), 7)[0].max_new_tokens == 7


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
