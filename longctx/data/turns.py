"""The turns of a conversation: read from a JSONL file, and put into the words of a model's chat template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPLY = "\N{REPLACEMENT CHARACTER}reply\N{REPLACEMENT CHARACTER}"  # stands for what the model said: nobody types it


@dataclass(frozen=True)
class UserTurn:
    """What the user says, the most tokens that the answer may have, and for errors where it was said."""

    text: str
    max_new_tokens: int
    where: str = ""


def turns_from(name: str, max_new_tokens: int, setting: str = "turns") -> tuple[UserTurn, ...]:
    """The turns of a JSONL file, a line ``{"text": ..., "max_new_tokens": n}`` each; ``setting`` named the file.

    A line without ``max_new_tokens`` takes the one given.  Raises ValueError naming the line that is wrong.
    """
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={name} cannot be read: {error}") from error
    # Not splitlines: a JSON string may hold other separators, like U+2028, as they are.
    lines = [(line, f"{setting}={name}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(
            f'{setting}={name} has no {setting}: give it lines like {{"text": "Hello", "max_new_tokens": 32}}'
        )
    return tuple(_turn(line, where, max_new_tokens) for line, where in lines)


def _turn(line: str, where: str, max_new_tokens: int) -> UserTurn:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("text"), str) or not given["text"].strip():
        raise ValueError(f'{where} needs some "text"')
    if unknown := set(given) - {"text", "max_new_tokens"}:
        raise ValueError(f'{where} has an unknown "{min(unknown)}": use "text" and "max_new_tokens"')
    most = given.get("max_new_tokens", max_new_tokens)
    if not isinstance(most, int) or isinstance(most, bool) or most < 0:
        raise ValueError(f'{where}: "max_new_tokens" is {json.dumps(most)}, use a number of tokens, 0 or more')
    return UserTurn(given["text"], most, where)


def turn_tokens(text: str, tokenizer: Any, *, before: list[int], ends: tuple[int, ...]) -> list[int]:
    """The new tokens of a turn that says ``text`` after the tokens ``before``, the model's answer up to next.

    With the model's chat template the end of the previous answer comes first, unless ``before`` ends in one of
    the end tokens ``ends`` already; a model without a template continues the plain text.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(text, add_special_tokens=not before)["input_ids"])
    says: list[dict[str, str]] = [{"role": "user", "content": text}]
    if not before:
        words = tokenizer.apply_chat_template(says, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])
    replied = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _REPLY}]
    words = tokenizer.apply_chat_template([*replied, *says], tokenize=False, add_generation_prompt=True)
    new = list(tokenizer(words.partition(_REPLY)[2], add_special_tokens=False)["input_ids"])
    return new[1:] if before[-1] in ends and new[0] == before[-1] else new
