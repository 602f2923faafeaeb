"""Conversations as training documents: tokens in the model's chat template, and which of them count in the loss."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from longctx.chat_date import writes_date
from longctx.config import DataSettings
from longctx.data.records import ReadRow, Record, TokenizedConversation, error_line, text_of

_ROLES = ("system", "developer", "user", "assistant")
_KEYS = ("role", "content", "weight")
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
Message = dict[str, str]


def conversation_reader(tokenizer: Any, ends: tuple[int, ...], data: DataSettings) -> ReadRow:
    """Return a function from a JSON object and its location to the `Record` of a conversation.

    See `messages_of` for the object.  ``ends`` are the tokens that end the model's answers.  A conversation that cannot
    be used becomes a record with a fault.  The fault is a wrong form, an error of the template, an answer that
    `tokenize_conversation` refuses, or, with ``data.conversations`` = whole, more than ``data.length`` tokens.

    Raises ValueError for a tokenizer without a chat template, for a template that `refuse_todays_date` refuses, and for
    a model without an end token.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template: set model.chat_template=FILE, or use an "
            "instruct model, such as model=smollm2_135m"
        )
    refuse_todays_date(tokenizer)
    if not ends:
        raise ValueError(
            "the model has no end token to close an answer with: set eos_token_id in its generation_config.json"
        )
    longest = data.length if data.conversations == "whole" else None
    # A run that has left out conversations and shuffles does not resume with another length (see `documents`).
    begin = "in a new run, " if data.shuffle and data.on_error == "skip" else ""

    def read(row: Any, where: str) -> Record:
        try:
            conversation = tokenize_conversation(messages_of(row), tokenizer, ends)
            if longest and len(conversation.tokens) > longest:
                raise ValueError(
                    f"has {len(conversation.tokens):,} tokens, more than data.length={longest:,} "
                    f"({begin}data.conversations=split would cut it; a larger data.length takes it whole)"
                )
        except ValueError as error:
            return Record(where, fault=str(error))
        return Record(where, conversation=conversation)

    return read


def refuse_todays_date(tokenizer: Any) -> None:
    """Raise ValueError if the chat template of ``tokenizer`` writes today's date, by transformers' strftime_now.

    The tokens of a run would then depend on the day, and a run could not be resumed on another day.
    """
    if writes_date(tokenizer.chat_template):
        raise ValueError(
            "the model's chat template writes today's date (strftime_now), so the run would have other tokens on "
            f"another day: set the day on which it begins, such as model.date={datetime.date.today().isoformat()}"
        )


def messages_of(row: Any) -> list[dict[str, Any]]:
    """Return the checked messages of ``row``: ``role``, ``content``, and 0 or 1 as ``weight`` (1 if null or missing).

    ``row`` has ``messages`` in the form of OpenAI's API, or a ``prompt`` and a ``completion``, which become a user's
    message and its answer.  An answer of weight 0 does not count in the loss, as in OpenAI's fine-tuning files; other
    messages never count.

    Raises ValueError, without the location, for other forms, rows with ``tools`` or ``functions``, and messages with
    other keys.  Other keys of ``row`` are not read.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"is not a JSON object of the form {_EXAMPLE}")
    if row.get("tools") or row.get("functions"):
        raise ValueError("has tools, which are not implemented in training")
    if row.get("messages") is None and {"prompt", "completion"} <= set(row):
        given: Any = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    else:
        given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise ValueError(
            f'has no "messages" that are a list of at least one, and no "prompt" with "completion": write {_EXAMPLE}'
        )
    return [_message(message, f"message {i}") for i, message in enumerate(given, 1)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"has a {name} that is not a JSON object with a role and a content")
    if (role := message.get("role")) not in _ROLES:
        raise ValueError(f"has a {name} of role {json.dumps(role)}: use {', '.join(_ROLES)}")
    if others := [key for key, value in message.items() if key not in _KEYS and value]:
        raise ValueError(f'has a {name} with "{others[0]}", which is not implemented: use {", ".join(_KEYS)}')
    if fault := text_of(message, "content", "").fault:
        raise ValueError(f"has a {name} that {fault.removesuffix(': set text_key')}")
    if role == "assistant" and not message["content"].strip():
        raise ValueError(f"has an empty answer, {name}")
    weight = 1 if message.get("weight") is None else message["weight"]  # datasets.to_json writes null for a missing key
    if weight not in (0, 1):
        raise ValueError(f'has a {name} of "weight" {json.dumps(weight)}: use 0 or 1')
    return {"role": role, "content": message["content"], "weight": weight}


def tokenize_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, ends: tuple[int, ...]
) -> TokenizedConversation:
    """Return the tokens of ``messages`` in the chat template, and which of them count in the loss.

    Each answer of weight 1 counts: the tokens after the template's beginning of an answer, up to and including the
    first end token.  Tokens after the last such answer are left out, since no loss depends on them.  In generation, the
    model sees the earlier messages in the template.  Their tokens must therefore be a prefix of the conversation's.

    Raises ValueError, without the location, if they are not a prefix, if no answer counts, and for an error of the
    template.  It also does so if an answer that counts is the first message, or as `_tokens_through_answer` does.
    """
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each["weight"]]
    if not answers:
        raise ValueError("has no assistant message to learn from: add one, or give one weight 1")
    if not answers[0]:
        raise ValueError("begins with an assistant message: put a user message before it")
    plain: list[Message] = [{"role": each["role"], "content": each["content"]} for each in messages]
    prefixes = [_tokens_through_answer(plain[: i + 1], tokenizer, ends) for i in answers]
    tokens = prefixes[-1][0]
    for i, (prefix, _) in zip(answers, prefixes, strict=True):
        if tokens[: len(prefix)] != prefix:
            raise ValueError(
                f"has an answer, message {i + 1}, that the chat template writes differently when messages follow: "
                "write one line per answer, with the messages up to it, and weight 0 for earlier answers, or set "
                "model.chat_template=FILE to a template that always writes it in the same way"
            )
    return TokenizedConversation(tuple(tokens), tuple((begin, len(prefix)) for prefix, begin in prefixes))


def _tokens_through_answer(messages: Sequence[Message], tokenizer: Any, ends: tuple[int, ...]) -> tuple[list[int], int]:
    """Return the tokens of ``messages``, the last of which is an answer, and the position at which the answer begins.

    They end with the answer's end token, one of ``ends``.  What a template writes after it is left out, such as Phi-3's
    further end token, which closes the whole conversation.

    Raises ValueError, naming the answer, if the template begins it differently in generation or does not close it, and
    if the answer's text has an end token.
    """
    n, tokens = len(messages), _template(messages, tokenizer)
    prompt = _template(messages[:-1], tokenizer, begins_answer=True)
    begin, names = len(prompt), ", ".join(repr(tokenizer.decode([token])) for token in ends)
    # 1. The answer begins as in generation.
    if tokens[:begin] != prompt:
        raise ValueError(
            f"has an answer, message {n}, that the chat template does not write after the beginning of a generated "
            f"answer (...{tokenizer.decode(prompt)[-30:]!r}), or whose tokens merge with it: set "
            "model.chat_template=FILE to a template that does, or begin the answer with the missing text, if the "
            "template keeps it there"
        )
    # 2. It is closed.
    if not set(ends) & set(tokens[begin:]):
        tokens = _with_next_end(tokens, messages, tokenizer, ends)
    at = [i for i, token in enumerate(tokens) if i >= begin and token in ends]
    if not at:
        raise ValueError(
            f"has a message {n} that the chat template does not close with an end token of the model ({names}): add "
            "the template's end of a turn to eos_token_id in generation_config.json, or set model.chat_template=FILE "
            "to a template that closes answers"
        )
    # 3. Its text has no end token.
    text = tokenizer(messages[-1]["content"], add_special_tokens=False, verbose=False)["input_ids"]
    if set(ends) & set(text):
        raise ValueError(
            f"has a message {n} with an end token of the model ({names}) inside its text: take it out of the text"
        )
    return tokens[: at[0] + 1], begin


def _with_next_end(tokens: list[int], messages: Sequence[Message], tokenizer: Any, ends: tuple[int, ...]) -> list[int]:
    """Return ``tokens``, those of ``messages``, with the token that begins the next user's message if it is an end.

    GLM-4's template closes answers only in this way.
    """
    following = _template([*messages, {"role": "user", "content": "-"}], tokenizer)
    n = len(tokens)
    return following[: n + 1] if following[:n] == tokens and set(following[n : n + 1]) & set(ends) else tokens


def _template(messages: Sequence[Message], tokenizer: Any, *, begins_answer: bool = False) -> list[int]:
    """Return the tokens of ``messages`` in the chat template.

    With ``begins_answer``, the tokens with which the template begins an answer follow.
    """
    try:
        chat = tokenizer.apply_chat_template(
            messages, add_generation_prompt=begins_answer, return_dict=True, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # a template can raise any error, such as for the order of roles
        raise ValueError(f"is refused by the model's chat template ({error_line(error)})") from error
    return list(chat["input_ids"])
