"""The documentation that ships with every CPython, as a source of real text that needs no download."""

import platform
from collections.abc import Iterator
from functools import partial

from longctx.data.records import Position, Record, SourceFile

_HELD_OUT = 10  # every tenth topic is in the test split


def topics(split: str) -> SourceFile:
    """Return the topics of ``split`` (train or test) in alphabetical order, one document each.

    Positions are topic numbers within the split, counted from 0.
    """
    from pydoc_data.topics import topics as texts

    names = [name for i, name in enumerate(sorted(texts)) if (i % _HELD_OUT == _HELD_OUT - 1) == (split == "test")]
    return SourceFile(f"pydoc:{split} of Python {platform.python_version()}", partial(_read_topics, names, texts))


def _read_topics(names: list[str], texts: dict[str, str], at: Position) -> Iterator[tuple[Record, Position]]:
    for i, name in enumerate(names[at or 0 :], at or 0):
        yield Record(f"pydoc topic {name}", texts[name]), i + 1
