"""Digests of files: a manifest names files by them, and a resumed run recognises its text by them."""

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from longctx.config import TextSource
from longctx.data.files import paths_of

_MAX_HASHED = 2**30  # bytes; a larger file is identified by its size, its first and its last bytes
_END = 2**20  # bytes at either end


def digest(path: Path) -> str:
    """Return ``sha256:`` and the digest of a file.

    For a file above 1 GiB, return ``ends-sha256:`` and the digest of its size, its first MiB and its last MiB.  A
    process reads a file only once, unless the file's size or modification time changes.
    """
    state = path.stat()
    return _digest(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _digest(path: Path, size: int, _changed_at: int) -> str:
    with path.open("rb") as file:
        if size <= _MAX_HASHED:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        head = file.read(_END)
        file.seek(-_END, os.SEEK_END)
        return f"ends-sha256:{hashlib.sha256(f'{size}'.encode() + head + file.read()).hexdigest()}"


def text_digests(sources: Iterable[TextSource]) -> list[list[str]]:
    """Return the digests of each source's files, in the order in which they are read.

    A source that is not in the user's files has an empty list.  The name and revision identify a dataset of the hub,
    and Python's version identifies CPython's documentation.
    """
    return [[digest(path) for path in paths_of(source.path)] if source.path else [] for source in sources]
