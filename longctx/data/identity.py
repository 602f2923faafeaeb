"""Digests of files, by which a manifest names them and a resumed run recognises its text."""

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

    For a file above 1 GiB, return ``ends-sha256:`` and the digest of its size, its first MiB and its last MiB.
    A process reads a file only once, unless its size or modification time changes.
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

    Text that is not in files of the user has none: a dataset of the hub is known by its name and revision, and the
    documentation of CPython by Python's version.
    """
    return [[digest(path) for path in paths_of(source.path)] if source.path else [] for source in sources]
