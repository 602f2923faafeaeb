"""Records of files and datasets: a location with its text, or with the reason why it has no usable text."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO, TextIOBase
from typing import Any

Position = Any
"""Offset of the next record in a `SourceFile`: a JSON value, None for the first record."""


@dataclass(frozen=True)
class TokenizedConversation:
    """The ``tokens`` of a conversation; for each (begin, end) in ``answers``, tokens[begin:end] count in the loss."""

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Record:
    """A ``text`` and its location: ``where`` is file and line, or dataset and row, for messages.

    A text file may be larger than memory, so its record has a function ``open_file`` instead of the text.  If
    conversations are read, ``conversation`` takes the place of the text.  A record that cannot be used has the reason
    in ``fault``; an empty text is no fault.
    """

    where: str
    text: str = ""
    fault: str = ""
    open_file: Callable[[], TextIOBase] | None = None
    conversation: TokenizedConversation | None = None

    @property
    def is_empty(self) -> bool:
        """True if the text has nothing but white space; also true for a record with a fault, which has no text."""
        return not self.open_file and not self.conversation and not self.text.strip()

    def open(self) -> TextIOBase:
        """Open the text for reading."""
        return self.open_file() if self.open_file else StringIO(self.text)


ReadRow = Callable[[Any, str], Record]
"""Turns a JSON value and its location into a record."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, or a whole dataset.

    ``read(position)`` yields each record from ``position`` on, with the position after it.  ``name`` includes the size
    or revision, so that a resume state does not fit a file that has changed.
    """

    name: str
    read: Callable[[Position], Iterator[tuple[Record, Position]]]


def text_of(row: Any, key: str, where: str) -> Record:
    """Return the record with the text under ``key`` of ``row``.

    If it is no valid text, the record has a fault instead; an empty text is valid.  ``where`` names the row in
    messages.
    """
    if not isinstance(row, Mapping):
        return Record(where, fault=f'is not a JSON object of the form {{"{key}": "..."}}')
    if key not in row:
        keys = ", ".join(sorted(row)) or "nothing"
        return Record(where, fault=f'has no "{key}", it has {keys}: set text_key')
    text = row[key]
    if not isinstance(text, str):
        return Record(where, fault=f'has a "{key}" of type {type(text).__name__}, not text')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character, which tokenizers refuse
            return Record(where, fault=f'has half a surrogate pair in its "{key}" (character {error.start})')
    return Record(where, text)


def error_line(error: Exception) -> str:
    """Return the type and message of ``error`` in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
