"""Start ranks as local processes, and end all of them when one fails."""

import math
import multiprocessing as mp
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from longctx.parallel import preload

Result = TypeVar("Result")
Args = TypeVarTuple("Args")

_preloaded: list[str] = []  # modules that the server imports, whenever it starts
_LONGEST_TEMP_DIR = 70  # bytes; a socket's path has at most 107, and multiprocessing adds up to 33
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_GATHER_S = 3.0  # from the first failure: other ranks that fail by then are compared to name the first


@dataclass(frozen=True)
class Rank:
    """Rank of a process: ``rank`` of ``world_size``, and ``local_rank`` of the ``local_world_size`` on its machine.

    ``init_method`` is torch.distributed's URL at which the ranks find each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str


class RankFailed(RuntimeError):
    """A rank raised, exited or was killed; with ``ended_others``, the other ranks were ended too.

    ``rank`` is the rank that failed first.  ``details`` is its traceback.  It is empty if the rank left none, and for
    an `OSError`, whose message says everything.  A rank of torchrun or srun does not end others: the launcher does.
    """

    def __init__(self, rank: int, world_size: int, reason: str, details: str, *, ended_others: bool = True) -> None:
        others = "; the other ranks were ended" if ended_others and world_size > 1 else ""
        super().__init__(f"rank {rank} of {world_size} {reason}{others}")
        self.rank, self.details = rank, details


def warm_up(modules: Sequence[str]) -> None:
    """Start the server process that local ranks are forked from, and import ``modules`` in it once.

    Returns at once, while the imports run.  Call it early, before the work that they should overlap.  A server that
    runs already does not import ``modules``.
    """
    mp.set_forkserver_preload([preload.__name__])
    _preloaded[:] = modules
    _start_server()


def _start_server() -> None:
    """Start the server process that ranks are forked from (multiprocessing's forkserver), if it does not run yet.

    The server imports modules from the same folders as this process.  By default, Python would let it search the
    working folder first, where a file such as ``eval.py`` may hide a package.

    Raises ValueError if longctx is in a folder that cannot be an entry of PYTHONPATH.
    """
    from multiprocessing import forkserver

    if os.pathsep in str(Path(__file__).parents[2]):
        raise ValueError(
            f"longctx is in {Path(__file__).parents[2]}: Python reads {os.pathsep} as the end of a folder's name, and "
            "the ranks would not find this copy: rename the folder"
        )
    _choose_temp_dir()
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", preload.VARIABLE: ",".join(_preloaded)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _choose_temp_dir() -> None:
    """Let multiprocessing use /tmp if the path of TMPDIR is too long for its sockets' paths."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TEMP_DIR:
        return
    before, tempfile.tempdir = tempfile.tempdir, "/tmp"  # noqa: S108
    get_temp_dir()  # which remembers the folder that it makes
    tempfile.tempdir = before


def run_ranks(world_size: int, rank_main: Callable[[Rank, *Args], Result], *args: *Args) -> list[Result]:
    """Run ``rank_main(Rank, *args)`` in ``world_size`` local processes and return the results in rank order.

    ``rank_main`` must be importable by name, and its arguments and results picklable.  If called in the main thread,
    it forwards SIGUSR1 to the ranks.  If this process dies, the ranks end too and remove its temporary folder.

    Raises `RankFailed` if a rank raises (also `SystemExit`), exits before ``rank_main`` returns, or is killed; all
    other ranks have been ended by then.
    """
    context = mp.get_context("forkserver")
    _start_server()
    # In multiprocessing's own temporary folder, so that there is one folder to remove.
    with tempfile.TemporaryDirectory(prefix="longctx-", dir=get_temp_dir()) as folder:
        processes = [
            context.Process(
                target=_run_one,
                args=(
                    Rank(i, world_size, i, world_size, f"file://{folder}/store"),
                    folder,
                    warnings.filters,
                    rank_main,
                    args,
                ),
                name=f"rank {i}",
            )
            for i in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            with _forward_signal(signal.SIGUSR1, processes):
                _wait_for_all(processes, Path(folder))
        finally:
            _end(processes)
        return [_read(Path(folder, f"result{i}")) for i in range(world_size)]


@contextmanager
def _forward_signal(number: int, processes: list[ForkServerProcess]) -> Iterator[None]:
    """Forward signal ``number`` to all ranks during the block; does nothing in a thread other than the main one."""

    def forward(*_: object) -> None:
        for process in processes:
            if process.pid and process.is_alive():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, before)


def _run_one(
    rank: Rank, folder: str, warning_filters: Any, rank_main: Callable[[Rank, *Args], object], args: tuple[*Args]
) -> None:
    """Run one rank in its process: write its result or its error to ``folder``, then exit."""
    warnings.filters = warning_filters  # a rank warns, or raises, as its parent would
    parent = mp.parent_process()
    assert parent is not None
    # A killed parent cannot end its ranks, so each rank watches the parent.
    threading.Thread(target=_die_with, args=(parent.sentinel, Path(folder).parent), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop; longctx.train.stop installs a handler
    try:
        result = rank_main(rank, *args)
        _write(Path(folder, f"result{rank.rank}"), result)
    except BaseException as error:
        reason = f"raised {type(error).__name__}: {error}"
        closed_pipe = isinstance(error, BrokenPipeError) and _is_reader_gone()
        _write(Path(folder, f"error{rank.rank}"), (reason, _details(error), time.time(), closed_pipe))
        _leave(1)
    _leave(0)


def _is_reader_gone() -> bool:
    """Return True if standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _details(error: BaseException) -> str:
    """Return the traceback of ``error``; empty if its message says everything: a full disk, a lost peer."""
    return "" if isinstance(error, OSError) else "".join(traceback.format_exception(error))


def _leave(code: int) -> None:
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Skip the interpreter's shutdown: background threads that wait for a lost peer can hang in it.
    os._exit(code)


def _die_with(sentinel: int, scratch: Path) -> None:
    """Wait until the parent process, whose handle is ``sentinel``, has ended; then end this process.

    The parent's temporary folder ``scratch`` is removed.
    """
    wait([sentinel])
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _wait_for_all(processes: list[ForkServerProcess], folder: Path) -> None:
    """Wait until all ranks have ended.  Raises `_first_failure` at most `_GATHER_S` seconds after it."""
    waiting: dict[Any, int] = {process.sentinel: i for i, process in enumerate(processes)}
    failed: list[int] = []  # in the order in which they ended
    until = math.inf
    while waiting and time.monotonic() < until:
        for sentinel in wait(list(waiting), timeout=0.1 if failed else None):
            rank = waiting.pop(sentinel)
            if processes[rank].exitcode or not Path(folder, f"result{rank}").exists():
                failed.append(rank)
                until = min(until, time.monotonic() + _GATHER_S)
    if failed:
        raise _first_failure(processes, failed, folder)


def _first_failure(processes: list[ForkServerProcess], failed: list[int], folder: Path) -> RankFailed | BrokenPipeError:
    """Return the failure to report: the first rank that ended without an error file, else the earliest error.

    A rank without an error file was killed or exited.  The others then raised because they lost it.  If the first rank
    could not print because the reader of its output has gone, it is a BrokenPipeError, as in this process.
    """
    silent = [i for i in failed if not Path(folder, f"error{i}").exists()]
    if silent:
        code = processes[silent[0]].exitcode or 0
        reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        reason += "" if code else " before it had a result"
        consequences = [f"rank {i} {error[0]}" for i in failed if (error := _read(Path(folder, f"error{i}")))]
        reason += f" ({consequences[0]})" if consequences else ""
        return RankFailed(silent[0], len(processes), reason, "")
    errors = {i: _read(Path(folder, f"error{i}")) for i in failed}
    first = min(errors, key=lambda i: errors[i][2])
    reason, details, _, closed_pipe = errors[first]
    return BrokenPipeError(reason) if closed_pipe else RankFailed(first, len(processes), reason, details)


def _end(processes: list[ForkServerProcess]) -> None:
    """Send SIGTERM to all ranks, and SIGKILL to those that have not ended `_GRACE_S` seconds later."""
    started = [process for process in processes if process.pid]
    for process in started:
        process.terminate()
    until = time.monotonic() + _GRACE_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _write(path: Path, value: object) -> None:
    """Pickle ``value`` to ``path`` in one step: readers see the whole file or none."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.rename(path)


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None
