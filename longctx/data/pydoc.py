"""The documentation that every CPython carries, as a part of a source: real text, where there is no other."""

import platform
from collections.abc import Iterator
from functools import partial

from longctx.data.records import Position, Record, SourceFile

_HELD_OUT = 10  # every so many-th topic is for testing


def topics(split: str) -> SourceFile:
    """A topic a document, of ``split`` train or test, in the order of their names; positions are counted from 0."""
    from pydoc_data.topics import topics as texts

    names = [name for i, name in enumerate(sorted(texts)) if (i % _HELD_OUT == _HELD_OUT - 1) == (split == "test")]
    return SourceFile(f"pydoc:{split} of Python {platform.python_version()}", partial(_texts, names, texts))


def _texts(names: list[str], texts: dict[str, str], at: Position) -> Iterator[tuple[Record, Position]]:
    for i, name in enumerate(names[at or 0 :], at or 0):
        yield Record(f"pydoc topic {name}", texts[name]), i + 1
