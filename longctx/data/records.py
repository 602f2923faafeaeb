"""Records: what files and datasets hold, each with its place and, where it is no text, with what is wrong with it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Position = Any
"""Where the next record of a part begins: a JSON value, None for the first."""


@dataclass(frozen=True)
class Record:
    """A text and ``where`` it stands: file and line, or dataset and row.  Or, in ``wrong``, why it is none."""

    where: str
    text: str = ""
    wrong: str = ""


@dataclass(frozen=True)
class SourceFile:
    """A file, or a whole dataset: ``read`` gives its records from a position on, each with the position behind it."""

    name: str
    read: Callable[[Position], Iterator[tuple[Record, Position]]]


def text_of(row: Mapping[str, Any], key: str, where: str) -> Record:
    """The text under ``key`` of a row; a record that is wrong if there is none."""
    if key not in row:
        has = ", ".join(sorted(row)) or "nothing"
        return Record(where, wrong=f'has no "{key}", it has {has}: set text_key')
    text = row[key]
    if not isinstance(text, str):
        return Record(where, wrong=f'has a "{key}" of type {type(text).__name__}, not text')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character, which tokenizers refuse
            return Record(where, wrong=f'has half a surrogate pair in its "{key}" (character {error.start})')
    return Record(where, text)


def in_a_line(error: Exception) -> str:
    """What a library's ``error`` says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
