"""Conversations as training documents: tokens in the model's chat template, and which of them count in the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

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

    Raises ValueError for a tokenizer without a chat template, and for a model without an end token.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template: set model.chat_template=FILE, or use an "
            "instruct model, such as model=smollm2_135m"
        )
    if not ends:
        raise ValueError("the model has no end token to close an answer with: set eos_token_id in its config.json")
    longest = data.length if data.conversations == "whole" else None

    def read(row: Any, where: str) -> Record:
        try:
            conversation = tokenize_conversation(messages_of(row), tokenizer, ends)
            if longest and len(conversation.tokens) > longest:
                raise ValueError(
                    f"has {len(conversation.tokens):,} tokens, more than data.length={longest:,} "
                    "(data.conversations=split would cut it; a larger data.length takes it whole)"
                )
        except ValueError as error:
            return Record(where, fault=str(error))
        return Record(where, conversation=conversation)

    return read


def messages_of(row: Any) -> list[dict[str, Any]]:
    """Return the checked messages of ``row``: ``role``, ``content``, and 0 or 1 as ``weight`` (1 if not given).

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
    if "messages" not in row and {"prompt", "completion"} <= set(row):
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
        raise ValueError(f'has a {name} of role "{role}": use {", ".join(_ROLES)}')
    if others := [key for key, value in message.items() if key not in _KEYS and value]:
        raise ValueError(f'has a {name} with "{others[0]}", which is not implemented: use {", ".join(_KEYS)}')
    if fault := text_of(message, "content", "").fault:
        raise ValueError(f"has a {name} that {fault.removesuffix(': set text_key')}")
    if role == "assistant" and not message["content"].strip():
        raise ValueError(f"has an empty answer, {name}")
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise ValueError(f'has a {name} of "weight" {weight}: use 0 or 1')
    return {"role": role, "content": message["content"], "weight": weight}


def tokenize_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, ends: tuple[int, ...]
) -> TokenizedConversation:
    """Return the tokens of ``messages`` in the chat template, and which of them count in the loss.

    Each answer of weight 1 counts: the tokens after the template's beginning of an answer, up to and including the end
    token.  Tokens after the last such answer are left out, since no loss depends on them.  In generation, the model
    sees the earlier messages in the template.  Their tokens must therefore be a prefix of the conversation's tokens.

    Raises ValueError, without the location, if they are not a prefix, if no answer counts, and for an error of the
    template.  It also does so if an answer that counts is the first message, or does not have exactly one end token.
    """
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each["weight"]]
    if not answers:
        raise ValueError("has no assistant message to learn from: add one, or give one weight 1")
    if not answers[0]:
        raise ValueError("begins with an assistant message: put a user message before it")
    plain: list[Message] = [{"role": each["role"], "content": each["content"]} for each in messages]
    whole = _template(plain[: answers[-1] + 1], tokenizer)
    spans = []
    for i in answers:
        begin = _prefix(_template(plain[:i], tokenizer, begins_answer=True), whole, i)
        answer = whole[begin : _prefix(_template(plain[: i + 1], tokenizer), whole, i)]
        spans.append((begin, begin + _length_to_end(answer, i, tokenizer, ends)))
    return TokenizedConversation(tuple(whole[: spans[-1][1]]), tuple(spans))


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


def _prefix(tokens: Sequence[int], whole: Sequence[int], i: int) -> int:
    """Return the number of ``tokens``, which must be a beginning of ``whole``, a conversation's tokens.

    Raises ValueError, naming the answer in message ``i`` (from 0), if they are not.
    """
    if list(whole[: len(tokens)]) != list(tokens):
        raise ValueError(
            f"has an answer, message {i + 1}, that the chat template writes differently when messages follow, or "
            "whose tokens merge with those before it: write one line per answer, with the messages up to it, and "
            "weight 0 for earlier answers"
        )
    return len(tokens)


def _length_to_end(answer: Sequence[int], i: int, tokenizer: Any, ends: tuple[int, ...]) -> int:
    """Return the number of tokens of ``answer`` up to and including its end token, one of ``ends``.

    Raises ValueError, naming message ``i`` (from 0), unless there is exactly one end token.
    """
    at = [n for n, token in enumerate(answer) if token in ends]
    if len(at) == 1:
        return at[0] + 1
    names = ", ".join(repr(tokenizer.decode([token])) for token in ends)
    if at:
        raise ValueError(f"has a message {i + 1} with an end token of the model ({names}) inside its text")
    raise ValueError(
        f"has a message {i + 1} that the chat template does not close with an end token of the model ({names}): "
        "add the template's end of a turn to eos_token_id in generation_config.json"
    )
