"""Read the user turns of a conversation from a JSONL file, and tokenize a turn with the model's chat template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.data.records import text_of
from longctx.data.tokenize import tokenize

# Placeholders for a question and its answer; users do not type them.
_QUESTION = "\N{REPLACEMENT CHARACTER}question\N{REPLACEMENT CHARACTER}"
_REPLY = "\N{REPLACEMENT CHARACTER}reply\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class UserTurn:
    """A user's ``text``, the maximum number of tokens of the answer, and the turn's location for error messages."""

    text: str
    max_new_tokens: int
    where: str = ""


def turns_from(name: str, max_new_tokens: int, setting: str = "turns") -> tuple[UserTurn, ...]:
    """Return the turns in the JSONL file ``name``, one ``{"text": ..., "max_new_tokens": n}`` per line.

    ``max_new_tokens`` is the default for lines that do not set it.  ``setting`` is the name of the file's setting, for
    messages.  Raises ValueError if the file cannot be read or has no turns, and for a faulty line, which the message
    names.
    """
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={name} cannot be read: {error}; give a JSONL file") from error
    # Not splitlines(), which would also split at separators like U+2028 inside a JSON string.
    lines = [(line, f"{setting}={name}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(
            f'{setting}={name} has no {setting}: give it lines like {{"text": "Hello", "max_new_tokens": 32}}'
        )
    return tuple(_turn(line, where, max_new_tokens) for line, where in lines)


def _turn(line: str, where: str, max_new_tokens: int) -> UserTurn:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets too deep
        raise ValueError(f"{where} is not JSON that can be read: {error}; correct it") from error
    if not isinstance(given, dict) or not isinstance(given.get("text"), str) or not given["text"].strip():
        raise ValueError(f'{where} needs some "text", like {{"text": "Hello"}}')
    if fault := text_of(given, "text", where).fault:
        raise ValueError(f"{where} {fault}: repair it")
    if unknown := set(given) - {"text", "max_new_tokens"}:
        raise ValueError(f'{where} has an unknown "{min(unknown)}": use "text" and "max_new_tokens"')
    limit = max_new_tokens if given.get("max_new_tokens") is None else given["max_new_tokens"]
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ValueError(f'{where}: "max_new_tokens" is {json.dumps(limit)}, use a number of tokens, 0 or more')
    return UserTurn(given["text"], limit, where)


def turn_tokens(
    text: str, tokenizer: Any, *, before: list[int], ends: tuple[int, ...], stops: tuple[int, ...] = ()
) -> list[int]:
    """Return the tokens to append to ``before``, the conversation so far, for a user turn ``text``.

    They end where the model's answer begins.  With a chat template, they begin with the end of the previous answer, if
    there is one.  Its end token is left out, with white space before it, if the answer already ended with it or with
    another of ``ends``, the model's end tokens.  ``stops`` are the user's, which end an answer but do not close it,
    unless the template writes the same token.  Without a template, the tokens are those of the plain text, with special
    tokens only in the first turn.
    """
    if not tokenizer.chat_template:
        return tokenize(text, tokenizer, special_tokens=not before).tolist()

    def encode(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    turn: list[dict[str, str]] = [{"role": "user", "content": text}]
    if not before:
        return encode(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    # The template of a conversation with a placeholder answer shows what follows an answer.
    answered = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}]
    words = tokenizer.apply_chat_template([*answered, *turn], tokenize=False, add_generation_prompt=True)
    asked, _, follows = words.partition(_REPLY)
    new, last = encode(follows), before[-1]
    if last not in (*ends, *stops):
        return new
    rest = _skip_space(new, tokenizer, last)
    closers = {last}
    if last in ends:
        # A template closes answers with the special token that closes questions, or with an end token.  A token that
        # begins questions, such as GLM-4's end token <|user|>, stays.
        begins, _, closes = asked.rpartition(_QUESTION)
        special = {*tokenizer.added_tokens_decoder}
        closer = {*_skip_space(encode(closes), tokenizer, last)[:1]} & special
        closers |= (closer | {*ends}) - {*_after_system_text(encode(begins), closer, special)}
    return rest[1:] if closers & {*rest[:1]} else new


def _after_system_text(begin: list[int], closer: set[int], special: set[int]) -> list[int]:
    """Return the tokens of ``begin`` that begin a question: those after a system text, if a ``closer`` closes one.

    A token among the ``special`` ones before any text begins messages, and closes none.
    """
    text = next((i for i, token in enumerate(begin) if token not in special), len(begin))
    closes = [i for i, token in enumerate(begin) if token in closer - {*begin[:text]}]
    return begin[closes[-1] + 1 :] if closes else begin


def _skip_space(tokens: list[int], tokenizer: Any, last: int) -> list[int]:
    """Return ``tokens`` from the first one that is not white space, or that is ``last``."""
    n = next((i for i, token in enumerate(tokens) if token == last or tokenizer.decode([token]).strip()), len(tokens))
    return tokens[n:]
