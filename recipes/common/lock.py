"""Locks: one run at a time writes to a file or folder.  A lock is released when its process ends, even if killed."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.common.cli import is_first, say

_locks: set[int] = set()  # descriptors of this process's locks
_OWN_JOB_S = 120.0  # a requeued Slurm job waits this long for the lock that its dead node held on a network file system
_MAKE_S = 2.0  # time for making a file in a folder that other processes remove


@contextmanager
def hold(file: Path, setting: str) -> Iterator[int | None]:
    """Hold a lock until the block ends or the process dies; of a launcher's ranks, only the first holds it.

    Gives the lock's descriptor, None on other ranks.  A subprocess to which it is passed holds the lock, too.

    ``file`` is the lock file: it is made with its folder, and removed at the end.  ``setting``, such as ``out=DIR``,
    names the locked file or folder in messages.  A file system without locks only gives a warning; the file is then
    removed by the run that wrote to it last.

    Raises ValueError, naming host and process, if another run has the lock.  A requeued Slurm job first waits up to two
    minutes for its former host to release it.
    """
    if not is_first():
        yield None
        return
    descriptor = _lock(file, setting)
    _locks.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        yield descriptor
    finally:
        if _holder(descriptor) == _this_process():  # without locks, another run may have written to the file since
            file.unlink(missing_ok=True)  # before the lock ends: `_lock` then sees that its file is gone
        _locks.discard(descriptor)
        os.close(descriptor)


def _leave_locks() -> None:
    """Close the locks of the parent in a process that was just forked: a lock lasts until its last copy is closed."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def lock_beside(place: Path) -> Path:
    """Return the path of the lock file of ``place``: ``a/.x.lock`` for ``a/x``.

    ``place`` is a file, or a folder that is replaced as a whole.
    """
    return place.with_name(f".{place.name}.lock")


def _lock(file: Path, setting: str) -> int:
    """Make and lock ``file``, and return its descriptor; without locks in the file system, warn and return it unlocked.

    Waits for another host of the same Slurm job, up to a limit.  Raises ValueError if another run holds it.
    """
    began = time.monotonic()
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Another process has just removed the folder; or the file cannot be made: in /proc, at a broken link.
            if time.monotonic() > began + _MAKE_S:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            if not _is_own_job(holder) or time.monotonic() > began + _OWN_JOB_S:
                os.close(descriptor)
                raise ValueError(_refusal(holder, setting)) from None
            time.sleep(1)
        except OSError as error:
            say(f"{setting}: its file system has no locks ({error.strerror}); do not start a second run there")
            return descriptor
        os.close(descriptor)


def _this_process() -> dict[str, str | int | None]:
    return {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _holder(descriptor: int) -> dict[str, str | int | None]:
    """Return what the process that holds the lock file has written about itself; empty if nothing yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_own_job(holder: dict[str, str | int | None]) -> bool:
    """Return True if ``holder`` belongs to this Slurm job but to another host, as after the job was requeued."""
    this = _this_process()
    return bool(this["job"]) and holder.get("job") == this["job"] and holder.get("host") != this["host"]


def _refusal(holder: dict[str, str | int | None], setting: str) -> str:
    process = f"process {holder['process']} on {holder['host']}" if "process" in holder else "another process"
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f"{setting} is in use by {process}{job}: wait until it ends, end it, or give another place"
