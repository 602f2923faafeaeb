"""SHA-256 of whole files, computed once and remembered in a file of the model cache."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock

from longctx.text_file import write_text

_SETTLED_NS = 2 * 10**9  # a file changed more recently may change again without a new modification time
_THREADS = 4
_LOCKS = 64  # lock files, each for a part of all sets of files: they are never removed


def sha256_of_files(files: Iterable[Path], cache: Path | None = None) -> list[str]:
    """Return the SHA-256 of each of ``files``, in their order, in hexadecimal digits.

    Digests are remembered in ``cache``/digests.json by path, size, times of modification and change, and inode.  If
    ``cache`` is None or cannot be written, every file is read.  Processes that share a cache and ask for the same
    ``files`` read them once, unless they changed in the last two seconds; for other files, they rarely wait.
    """
    paths = [file.resolve() for file in files]
    store = cache / "digests.json" if cache else None
    key = int(hashlib.sha256(repr(paths).encode()).hexdigest(), 16) % _LOCKS
    with _locked(store.with_name(f"digests-{key}.lock")) if store else nullcontext():
        known = _read(store) if store else {}
        before = {path: _state(path) for path in paths}
        missing = [path for path, state in before.items() if known.get(str(path), [])[:-1] != state]
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = dict(zip(missing, pool.map(_sha256, missing), strict=True))
        result = [digests.get(path) or str(known[str(path)][-1]) for path in paths]
        settled = [path for path in missing if before[path] == _state(path) and _is_settled(path)]
        if store and settled:
            _add(store, {str(path): [*before[path], digests[path]] for path in settled})
    return result


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_settled(path: Path) -> bool:
    return time.time_ns() - path.stat().st_mtime_ns > _SETTLED_NS


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock ``file`` during the block; go on without a lock if it cannot be written."""
    lock = FileLock(file, mode=0o666)  # for all users of the cache
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(store: Path) -> dict[str, list[int | str]]:
    """Return the states and digests in ``store``; an empty dictionary if ``store`` cannot be read."""
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _add(store: Path, new: dict[str, list[int | str]]) -> None:
    """Add states and digests to ``store``, and remove those of deleted files; do nothing if it cannot be written."""
    with _locked(store.with_suffix(".lock")), suppress(OSError):
        known = {path: state for path, state in (_read(store) | new).items() if os.path.exists(path)}  # noqa: PTH110
        write_text(store, json.dumps(known, indent=1) + "\n")
