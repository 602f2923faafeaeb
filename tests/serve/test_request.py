"""Requests in OpenAI's form become settings, or are refused with the field and what to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from longctx.config import Sampling
from longctx.hf.config import shape_of
from longctx.serve.bodies import ChatBody, CompletionBody, RequestRefused, TokenizeBody, describe_invalid
from longctx.serve.request import Reader
from tests.tiny import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};"
    "{% if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}{% endfor %}a:"
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder: Path = tiny_model(tmp_path_factory.mktemp("request") / "tiny", max_positions=97)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    defaults = Sampling(1.0, stop=("STOP",), repetition_penalty=1.1)
    return Reader("tiny", shape_of(folder), tokenizer, defaults, max_tokens=83, max_choices=5)


def completion(reader: Reader, prompt: Any = "abc", **fields: Any):
    return reader.completion(CompletionBody.model_validate({"model": "tiny", "prompt": prompt, **fields}))


def chat(reader: Reader, messages: Any = ({"role": "user", "content": "hi"},), **fields: Any):
    return reader.chat(ChatBody.model_validate({"model": "tiny", "messages": list(messages), **fields}))


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text)["input_ids"])


def test_fields_become_settings_and_others_are_the_servers(reader):
    ask = completion(
        reader, ["abc", "de"], n=2, max_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-1,
        presence_penalty=0.3, frequency_penalty=-0.3, stop="x", stop_token_ids=[7], logprobs=3, stream=True,
        stream_options={"include_usage": True}, user="me", best_of=1, logit_bias={}, suffix=None,
    )  # fmt: skip
    assert ask.sampling == Sampling(
        0.5, 0.9, min_p=0.1, presence_penalty=0.3, frequency_penalty=-0.3, repetition_penalty=1.1, stop=("x",),
        stop_tokens=(7,), logprobs=3, seed=2**32 - 1,
    )  # fmt: skip
    assert (ask.prompts, ask.max_new_tokens, ask.n) == ((ids("abc"), ids("de")), (7, 7), 2)
    assert ask.stream and ask.include_usage and not ask.echo
    assert [(prompt, most, one.seed) for prompt, most, one in ask.choices] == [
        (ids("abc"), 7, 2**32 - 1), (ids("abc"), 7, 0), (ids("de"), 7, 1), (ids("de"), 7, 2),
    ]  # fmt: skip


def test_defaults_are_those_of_openai(reader):
    ask = completion(reader, [5, 6])
    assert ask.prompts == ((5, 6),) and ask.max_new_tokens == (16,) and ask.sampling.logprobs is None
    assert completion(reader).sampling.seed != ask.sampling.seed, "without a seed, answers differ"
    assert completion(reader, "x" * 80).max_new_tokens == (3,)
    assert completion(reader, [[5], [6, 7]]).prompts == ((5,), (6, 7))
    assert chat(reader).max_new_tokens == (83 - 7,), "a chat's answer may fill the cache"
    greedy = completion(reader, temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert greedy.sampling == Sampling(0.0, repetition_penalty=1.1, stop=("STOP",), seed=greedy.sampling.seed)


def test_chat_uses_the_template(reader):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    ask = chat(reader, [{"role": "system", "content": "be"}, {"role": "user", "content": parts}], logprobs=True)
    assert ask.prompts == (ids("s:be;u:hi;a:"),) and ask.sampling.logprobs == 0 and ask.chat
    assert chat(reader, logprobs=True, top_logprobs=4, max_completion_tokens=3).sampling.logprobs == 4
    assert chat(reader, max_tokens=9, response_format={"type": "text"}).max_new_tokens == (9,)


def test_tokenize_takes_a_text_or_messages(reader):
    assert reader.tokens(TokenizeBody(prompt="ab")) == ids("ab")
    assert reader.tokens(TokenizeBody(messages=[{"role": "user", "content": "hi"}])) == ids("u:hi;a:")
    with pytest.raises(RequestRefused, match="either prompt or messages"):
        reader.tokens(TokenizeBody())
    assert reader.tokens(TokenizeBody(prompt="ab", model="tiny")) == ids("ab")
    with pytest.raises(RequestRefused, match="the model 'gpt' does not exist: use 'tiny'") as refused:
        reader.tokens(TokenizeBody(prompt="ab", model="gpt"))
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("ask", "fields", "param", "message"),
    [
        (completion, {"model": "gpt"}, "model", "the model 'gpt' does not exist: use 'tiny'"),
        (completion, {"prompt": ""}, "prompt", "empty"),
        (completion, {"prompt": []}, "prompt", "empty"),
        (completion, {"prompt": "x" * 84}, "prompt", "84 tokens, and 83 fit, .* an answer: shorten the prompt$"),
        (completion, {"prompt": "x" * 84, "max_tokens": 5}, "prompt", "84 tokens, and 83 fit, .*: shorten the prompt$"),
        (completion, {"prompt": "x" * 84, "max_tokens": 0, "echo": True}, "prompt", "84 tokens, and 83 fit: shorten"),
        (chat, {"messages": [{"role": "user", "content": "x" * 90}]}, "messages", "95 tokens, .*: shorten the prompt$"),
        (chat, {"max_completion_tokens": 77}, "max_completion_tokens", "=77 .*, or lower max_completion_tokens$"),
        (completion, {"max_tokens": 0}, "max_tokens", "max_tokens=0 answers nothing: use echo=true"),
        (chat, {"max_tokens": 0}, "max_tokens", "max_tokens=0 answers nothing: use at least 1"),
        (completion, {"max_tokens": 81}, "max_tokens", "with max_tokens=81 that is more than the 83"),
        (completion, {"prompt": [256]}, "prompt", "token 256, beyond the model's vocabulary"),
        (completion, {"prompt": [2**40], "echo": True}, "prompt", "token 1,099,511,627,776, beyond"),
        (completion, {"stop_token_ids": [300]}, "stop_token_ids", "beyond the model's vocabulary"),
        (completion, {"n": 6}, "n", "1 prompts with n=6 are 6 answers: use 1 to 5"),
        (completion, {"temperature": -1}, "temperature", "^temperature=-1.0: use 0 for greedy"),
        (completion, {"top_p": 0}, "top_p", "^top_p=0.0: use a number above 0"),
        (completion, {"frequency_penalty": 3}, "frequency_penalty", "use -2 to 2"),
        (completion, {"stop": ["a", ""]}, "stop", "^stop has an empty text"),
        (completion, {"stop": ["a"] * 17}, "stop", "17 texts: use at most 16"),
        (completion, {"stop": ["a" * 999, "bc"]}, "stop", "stop has 1,001 characters: use at most 1,000"),
        (completion, {"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not implemented: leave it out"),
        (completion, {"best_of": 2}, "best_of", "not implemented"),
        (completion, {"add_special_tokens": False}, "add_special_tokens", "not implemented"),
        (completion, {"skip_special_tokens": False}, "skip_special_tokens", "not implemented"),
        (completion, {"min_tokens": False}, "min_tokens", "not implemented"),
        (chat, {"add_generation_prompt": False}, "add_generation_prompt", "not implemented"),
        (chat, {"tools": [{"type": "function"}]}, "tools", "tools is not implemented"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        (chat, {"messages": [{"role": "bad", "content": "x"}]}, "messages", "template refuses .* no"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url is not"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "of type text is not"),
        (chat, {"messages": [{"role": "u", "content": [{"type": "text", "text": "a", "b": 1}]}]}, "messages", "b of"),
        (chat, {"messages": [{"role": "user", "content": "a", "images": ["b"]}]}, "messages", "images of a message is"),
        (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half of a surrogate pair: send"),
        (completion, {"prompt": "a\ud800"}, "prompt", "character 1 is half of a surrogate pair"),
        (completion, {"stop": ["\udc00"]}, "stop", "character 0 is half of a surrogate pair"),
        (chat, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages", "tool_calls of a"),
        (chat, {"max_tokens": 5, "max_completion_tokens": 7}, "max_tokens", "differ: leave one of them out"),
        (completion, {"temperature": 0, "top_p": 7}, "top_p", "^top_p=7.0: use a number above 0"),
        (completion, {"temperature": 0, "min_p": -3}, "min_p", "^min_p=-3.0"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_answered_are_refused(reader, ask, fields, param, message):
    with pytest.raises(RequestRefused, match=message) as refused:
        ask(reader, **fields)
    assert (refused.value.param, refused.value.status) == (param, 404 if param == "model" else 400)


@pytest.mark.parametrize(
    ("fields", "place"),
    [({"temperature": "hot"}, "temperature"), ({"max_tokens": -1}, "max_tokens"), ({"n": True}, "n"),
     ({"seed": 0.5}, "seed"), ({"temperature": True}, "temperature"), ({"top_p": "0.5"}, "top_p"),
     ({"temperature": float("nan")}, "temperature"),
     ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
     ({"prompt": [[1], [2, -1]]}, "prompt.1.1: "), ({"prompt": {"a": 1}}, "prompt: "),
     ({"prompt": [1, -1, -1, "a"]}, "prompt.1: "), ({"prompt": ["a", 1, 1]}, "prompt.1: "),
     ({"prompt": [[1]] * 10_001}, "prompt: List should have at most 10000 items"),
     ({"stop": ["a", 1, 1]}, "stop.1: "), ({"stop_token_ids": ["a", "b"]}, "stop_token_ids.0: "),
     ({"stop_token_ids": [5] * 1025}, "stop_token_ids: List should have at most 1024 items"),
     ({"messages": [1, 1]}, "messages.0: "),
     ({"messages": [{"role": "user", "content": [1, 1]}]}, "messages.0.content.0: "),
     ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: Input should be a valid string")],
)  # fmt: skip
def test_values_of_another_type_are_named(fields, place):
    """There is one error, even if a list has a million wrong items."""
    with pytest.raises(ValidationError) as invalid:
        (ChatBody if "messages" in fields else CompletionBody).model_validate(
            {"model": "tiny", "prompt": "a", **fields}
        )
    message, param = describe_invalid(invalid.value.errors())
    assert param == next(iter(fields)) and message.startswith(place) and len(invalid.value.errors()) == 1


@pytest.mark.parametrize("ask", [completion, chat])
def test_too_many_answers_are_refused_before_prompts_are_tokenized(reader, ask):
    fields = {"prompt": ["a"] * 3} if ask is completion else {}
    with pytest.raises(RequestRefused, match=r"are 6 answers: use 1 to 5"):
        ask(replace(reader, tokenizer=None), n=2 if fields else 6, **fields)


def test_conversation_that_the_template_makes_empty_is_refused(reader):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestRefused, match="a prompt is empty"):
        chat(replace(reader, tokenizer=tokenizer), messages=[{"role": "user", "content": ""}])


def test_model_without_a_template_names_the_other_route(reader):
    with pytest.raises(RequestRefused, match="has no chat template: use /v1/completions"):
        chat(replace(reader, tokenizer=tiny_tokenizer()))


def test_fields_without_effect_are_accepted(reader):
    neutral = {"add_special_tokens": True, "min_tokens": 0, "suffix": "", "logit_bias": None, "unknown": None}
    assert completion(reader, **neutral).prompts == (ids("abc"),)
    assert chat(reader, tools=[], tool_choice="auto", modalities=["text"], functions=None).chat


def test_message_has_fields_that_the_template_names_and_parts_of_text(reader):
    empty = {"role": "assistant", "content": "a", "tool_calls": None, "annotations": [], "refusal": None}
    parts = [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
             {"type": "text", "text": "c", "annotations": None}]  # fmt: skip
    assert chat(reader, [empty, {"role": "user", "content": parts}]).prompts == (ids("a:a;u:bc;a:"),)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.name }}={{ m.content }}")
    named = replace(reader, tokenizer=tokenizer)
    assert chat(named, [{"role": "user", "content": "a", "name": "me"}]).prompts == (ids("u:me=a;a:"),)
    assert chat(reader, [{"role": "user", "content": "a", "name": "me"}]).prompts == (ids("u:a;a:"),), "has no effect"


@pytest.mark.parametrize(
    ("template", "is_read"),
    [("{{ m.content }}{{ m.name_of }}", "name_of"), ("{{ m['content'] }}{{ m['x'] }}", "x"), ('{{ m.get("x") }}', "x"),
     ("{% if 'x' in m %}x{% endif %}", "x"), ("{% if m.x is defined %}x{% endif %}", "x"), ("{{ m.content }}", "")],
)  # fmt: skip
def test_message_has_no_field_that_is_only_a_part_of_the_template(reader, template, is_read):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        f"text.tail{{% for m in messages %}}{{{{ loop.first }}}}{{{{ m.role.strip() }}}}{template}{{% endfor %}}"
    )
    one = replace(reader, tokenizer=tokenizer)
    message = {"role": "user", "content": "a"}
    assert not is_read or chat(one, [{**message, is_read: "b"}])
    for name in ("ntent", "ages", "loop", "e", "m", "messages", "first", "strip", "tail", "endif"):
        with pytest.raises(RequestRefused, match=f"^{name} of a message is not implemented"):
            chat(one, [{**message, name: "b"}])


def test_null_is_a_field_that_is_left_out(reader):
    assert not completion(reader, stream=True, stream_options={"include_usage": None}).include_usage
    assert reader.tokens(TokenizeBody(prompt="ab", add_special_tokens=None)) == ids("ab")


def test_smaller_bodies_refuse_fields_with_an_effect(reader):
    neutral = {"include_usage": True, "continuous_usage_stats": False, "include_obfuscation": True}
    assert completion(reader, stream=True, stream_options=neutral).include_usage
    with pytest.raises(RequestRefused, match="continuous_usage_stats is not implemented"):
        completion(reader, stream=True, stream_options={"continuous_usage_stats": True})
    assert reader.tokens(TokenizeBody(prompt="ab", add_generation_prompt=True, return_token_strs=False)) == ids("ab")
    with pytest.raises(RequestRefused, match="truncate_prompt_tokens is not implemented"):
        reader.tokens(TokenizeBody(prompt="ab", truncate_prompt_tokens=1))
