"""Conversations: the learned tokens are those that transformers marks, and everything else is refused by its line."""

import json
from collections import Counter

import pytest

from longctx.config import DataSettings, TextSource
from longctx.data.batches import training_batches
from longctx.data.conversations import messages_of, tokenize_conversation
from tests.data.texts import assert_resumes, take
from tests.tiny import tiny_tokenizer

# transformers marks the tokens of a {% generation %} block.
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<end>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<end>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}"
)
END = 256
ENDS = (END,)
# In the manner of Phi-3: an end after each message, and another one after the conversation.
PHI3 = (
    "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% else %}{{ '<eos>' }}{% endif %}"
)
# In the manner of GLM-4: the beginning of the next question is the end of an answer.
GLM4 = (
    "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}"
)
# In the manner of DeepSeek-R1's distilled models: a generated answer begins with reasoning, a given one has none.
THINK = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"
)


def chat(*contents: str) -> dict:
    """A conversation: the contents of the user and of the assistant, in turn."""
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def chats(count: int) -> list[dict]:
    return [chat(*(f"{n} {'word ' * (n * m % 5)}" for m in range(2 * (n % 3 + 1)))) for n in range(1, count + 1)]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(eos_token="<end>", chat_template=TEMPLATE)


@pytest.fixture
def write(tmp_path):
    """``write(rows, **settings)``: the settings of a JSONL file with ``rows``, one epoch."""

    def settings_of(rows: list, **changed) -> DataSettings:
        file = tmp_path / "chats.jsonl"
        file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        settings = {"length": 97, "batch": 1, "epochs": 1, "end_token": False, "last": "pad", "conversations": "whole"}
        return DataSettings((TextSource(path=str(file)),), **{**settings, **changed})

    return settings_of


def marked(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of ``row`` and 1 for each that the model must write, by transformers."""
    whole = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    return whole["input_ids"], whole["assistant_masks"]


@pytest.mark.parametrize(
    "row", [*chats(3), {"messages": [{"role": "system", "content": ""}, *chat("a", "b")["messages"]]}]
)
def test_learned_tokens_are_those_that_transformers_marks(row, tokenizer):
    got = tokenize_conversation(messages_of(row), tokenizer, ENDS)
    tokens, learned = marked(row, tokenizer)
    assert list(got.tokens) == tokens[:-1], "all but the line's end, which no loss depends on"
    at = {i for begin, end in got.answers for i in range(begin, end)}
    assert at == {i for i, one in enumerate(learned) if one}
    assert [got.tokens[end - 1] for _, end in got.answers] == [END] * (len(row["messages"]) // 2)


def texts_of(conversation, tokenizer) -> list[str]:
    """The texts to learn."""
    return [tokenizer.decode(conversation.tokens[begin:end]) for begin, end in conversation.answers]


def test_prompt_and_completion_are_a_user_and_an_answer(tokenizer):
    assert messages_of({"prompt": "a", "completion": "b", "id": 7}) == messages_of(chat("a", "b"))


def test_messages_of_weight_0_and_messages_after_the_last_answer_are_not_learned(tokenizer):
    row = chat("a", "first", "b", "second", "c")
    row["messages"][1]["weight"] = 0
    got = tokenize_conversation(messages_of(row), tokenizer, ENDS)
    assert texts_of(got, tokenizer) == ["second<end>"]
    assert tokenizer.decode(got.tokens).endswith("second<end>")


@pytest.mark.parametrize(("template", "end"), [(PHI3, "<end>"), (GLM4, "<user>")], ids=["Phi-3", "GLM-4"])
def test_answer_ends_at_the_first_end_token_that_follows_it(template, end):
    tokenizer = tiny_tokenizer(eos_token="<eos>", extra_special_tokens=["<end>", "<user>"], chat_template=template)
    ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end))
    row = chat("a", "first", "b", "second")
    got = tokenize_conversation(messages_of(row), tokenizer, ends)
    assert texts_of(got, tokenizer) == [f"first{end}", f"second{end}"]
    prompt = tokenizer.apply_chat_template(row["messages"][:3], add_generation_prompt=True, return_dict=True)
    assert list(got.tokens[: got.answers[1][0]]) == prompt["input_ids"]
    row["messages"][1]["weight"] = 0
    assert texts_of(tokenize_conversation(messages_of(row), tokenizer, ends), tokenizer) == [f"second{end}"]
    with pytest.raises(ValueError, match=r"message 2 with an end token of the model .* inside its text: take it out"):
        tokenize_conversation(messages_of(chat("a", f"b{end}c")), tokenizer, ends)


def test_null_counts_as_a_missing_key():
    """As datasets.to_json writes it, for example for every message as soon as one has a weight."""
    messages = [{**message, "weight": None} for message in chat("a", "b")["messages"]]
    assert messages_of({"messages": messages}) == messages_of(chat("a", "b"))
    assert messages_of({"messages": None, "prompt": "a", "completion": "b"}) == messages_of(chat("a", "b"))


REFUSED = {
    "role": ({"messages": [{"role": "bot", "content": "a"}]}, r'message 1 of role "bot": use system, '),
    "no role": ({"messages": [{"content": "a"}]}, r"message 1 of role null: use system, "),
    "form": ({"text": "a"}, r'has no "messages" .* and no "prompt" with "completion": write'),
    "list": ([1], "is not a JSON object of the form"),
    "string": ({"messages": ["a"]}, "message 1 that is not a JSON object"),
    "content": ({"messages": [{"role": "user"}]}, r'message 1 that has no "content", it has role; repair'),
    "parts": ({"messages": [{"role": "user", "content": [{}]}]}, 'has a "content" of type list'),
    "tools": ({"tools": [{}], **chat("a", "b")}, "has tools, which are not implemented"),
    "calls": ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, 'with "tool_calls", which is not'),
    "weight": ({"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, '"weight" 0.5: use 0 or 1'),
    "weight text": ({"messages": [{"role": "user", "content": "a", "weight": "1"}]}, '"weight" "1": use 0 or 1'),
    "empty": (chat("a", " "), "has an empty answer, message 2"),
    "no answer": (chat("a"), "has no assistant message to learn from"),
    "answer first": ({"messages": chat("a", "b")["messages"][1:]}, "begins with an assistant message"),
    "end token": (chat("a", "b<end>c"), r"message 2 with an end token of the model \('<end>'\) inside its text"),
    "too long": (chat("a", "b" * 97), r"has 1\d\d tokens, more than data\.length=97 \(data\.conversations=split would"),
    "not JSON": ("{", r"is not JSON \("),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED)
def test_conversation_that_cannot_be_learned_is_refused_by_its_line(row, words, tokenizer, write):
    data = write([chat("a", "b"), row])
    with pytest.raises(ValueError, match=rf"chats\.jsonl, line 2 .*{words}.*set data\.on_error=skip"):
        take(training_batches(data, tokenizer, ends=ENDS))
    data = write([chat("a", "b"), row, chat("c", "d")], on_error="skip")
    ((batch, state),) = take(training_batches(data, tokenizer, ends=ENDS))
    assert batch.counted == 4 and state["documents"]["sources"][0]["skipped"] == 1


TEMPLATES = {
    "earlier answers differ": (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}!{% endif %}"
        "{{ m.content }}<end>{% endfor %}",
        "message 2, that the chat template writes differently .*: write one line per answer.*, or set model",
    ),
    "generated answers differ": (
        THINK,
        r"message 2, that the chat template does not write after .* a generated answer "
        r"\(...'.*<assistant><think>\\n'\), .*: set model.chat_template=FILE",
    ),
    "no end of a turn": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}",
        r"message 2 that the chat template does not close with an end token of the model \('<end>'\): add .* or set",
    ),
    "an error": ("{{ raise_exception('roles must alternate') }}", r"chat template \(TemplateError: roles must altern"),
    "no template": (
        None,
        "has no chat template: set model.chat_template=FILE, or use an instruct",
    ),
}


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_template_without_exact_answers_is_refused(template, words, tokenizer, write):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words):
        take(training_batches(write([chat("a", "b", "c", "d")]), tokenizer, ends=ENDS))


def test_model_without_an_end_token_is_refused(tokenizer, write):
    with pytest.raises(ValueError, match="has no end token to close an answer with: set eos_token_id"):
        training_batches(write(chats(2)), tokenizer)


def test_template_with_todays_date_is_refused_until_the_date_is_fixed(write, tokenizer):
    """A run that resumes on another day would tokenize the same conversations to other tokens."""
    condition = "{% if strftime_now is defined %}DATE{% endif %}"
    tokenizer.chat_template = condition.replace("DATE", "{{ strftime_now('%d %b %Y') }}") + TEMPLATE
    with pytest.raises(ValueError, match=r"today's date .* set the day .* such as model.date=2"):
        training_batches(write(chats(1)), tokenizer, ends=ENDS)
    tokenizer.chat_template = condition.replace("DATE", "{{ '26 Jul 2024' }}") + TEMPLATE
    assert take(training_batches(write(chats(1)), tokenizer, ends=ENDS))


@pytest.mark.parametrize("length", [83, 97, 331])
def test_whole_conversations_are_packed_in_order_and_none_is_cut(length, tokenizer, write):
    rows, data = chats(11), write(chats(11), length=length, on_error="skip")
    pieces = []
    for batch, _ in take(training_batches(data, tokenizer, ends=ENDS)):
        assert batch.tokens.shape == (1, length) and batch.counted == batch.mask.sum() > 0
        fields = (x[0].split(list(batch.lengths[0])) for x in (batch.tokens, batch.targets, batch.mask))
        pieces += [piece for piece in zip(*fields, strict=True) if piece[0].any()]
    whole = [marked(row, tokenizer) for row in rows]
    fitting = [(tokens[:-1], learned[:-1]) for tokens, learned in whole if len(tokens) - 1 <= length]
    assert len(pieces) == len(fitting) > 3
    for (tokens, targets, mask), (ids, learned) in zip(pieces, fitting, strict=True):
        assert tokens.tolist() == ids
        assert targets.tolist() == [*ids[1:], 0]
        assert mask.tolist() == [bool(x) for x in [*learned[1:], 0]]


@pytest.mark.parametrize("length", [7, 31, 331])
def test_split_conversations_have_no_padding_and_learn_every_token_of_an_answer_once(length, tokenizer, write):
    data = write(chats(11), length=length, conversations="split")
    batches = [batch for batch, _ in take(training_batches(data, tokenizer, ends=ENDS))]
    learned = Counter(token for batch in batches for token in batch.targets[batch.mask].tolist())
    want = [marked(row, tokenizer) for row in chats(11)]
    assert learned == Counter(token for ids, learn in want for token, one in zip(ids, learn, strict=True) if one)
    assert all(batch.counted for batch in batches), "sequences of prompts alone are left out"
    assert all((batch.tokens != 0).all() for batch in batches[:-1])


@pytest.mark.parametrize("settings", [{}, {"conversations": "split", "length": 31}, {"shuffle": 4}], ids=str)
def test_run_resumes_after_every_batch(settings, tokenizer, write):
    data = write(chats(11), **{"batch": 2, "epochs": None, "on_error": "skip", **settings})
    assert_resumes(training_batches(data, tokenizer, ends=ENDS), 7)


def test_length_that_would_change_the_shuffle_windows_is_refused(tokenizer, write, caplog):
    """With on_error=skip, conversations that are too long are in no window; stop has left none out."""
    rows, long = [chat("a" * n, "b") for n in range(8)], [chat("a" * (60 + n), "b") for n in range(4)]
    mixed = [row for pair in zip(rows, [*long, *long], strict=True) for row in pair]
    for settings, content in (({"on_error": "skip"}, mixed), ({}, rows)):
        settings |= {"shuffle": 4, "length": 48}
        data = write(content, **settings)
        states = [state for _, state in take(training_batches(data, tokenizer, ends=ENDS))]
        for length in (47, 97):
            other = training_batches(write(content, **settings | {"length": length}), tokenizer, ends=ENDS)
            if content is rows and length == 97:
                assert len(take(other, state=states[0])) < len(states)
                continue
            with pytest.raises(ValueError, match=r"data\.length=48: with data\.shuffle=4, .* use this length, or"):
                take(other, 1, states[0])
    assert "(in a new run, data.conversations=split would cut it" in caplog.text
    in_order = write(mixed, on_error="skip", length=48)
    ((_, state),) = take(training_batches(in_order, tokenizer, ends=ENDS), 1)
    assert take(training_batches(write(mixed, on_error="skip"), tokenizer, ends=ENDS), state=state)


def test_state_of_a_cut_conversation_is_refused_by_whole_ones(tokenizer, write):
    data = write(chats(5), length=31, conversations="split")
    states = [state for _, state in take(training_batches(data, tokenizer, ends=ENDS))]
    cut = next(state for state in states if state["used"])
    with pytest.raises(ValueError, match=r"has cut a conversation: use data\.conversations=split"):
        take(training_batches(write(chats(5), length=331), tokenizer, ends=ENDS), 1, cut)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "notes.txt"}, r"notes\.txt is not a \.jsonl file, .* give \.jsonl files"),
        ({"pydoc": "train"}, "pydoc:train has no lines of conversations: give the path"),
        ({"path": "notes.txt", "text_key": "body"}, "text_key=body is not used by conversations: leave it out"),
    ],
)
def test_text_is_refused(source, words, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(ValueError, match=words):
        training_batches(
            DataSettings((TextSource(**source),), end_token=False, conversations="whole"), tokenizer, ends=ENDS
        )


def test_end_token_of_the_text_is_refused():
    with pytest.raises(ValueError, match=r"data\.end_token=true: the chat template ends a conversation; use false"):
        DataSettings((TextSource(path="a.jsonl"),), conversations="whole")


def test_learned_tokens_of_smollm2_are_answers_and_ends_of_turns(smollm2):
    """Its template has no {% generation %}, and a system message of its own."""
    from longctx.hf.config import shape_of, tokenizer_of

    tokenizer = tokenizer_of(smollm2[1])
    got = tokenize_conversation(
        messages_of(chat("2 + 2?", "4.", "And 3?", "It is\n7.")), tokenizer, shape_of(smollm2[1]).end_tokens
    )
    assert texts_of(got, tokenizer) == ["4.<|im_end|>", "It is\n7.<|im_end|>"]
