"""How ranks come to be: started here, one process each, all ended as soon as one fails; or by a launcher."""

import math
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_GATHER_S = 3.0  # how long to listen for other failures before saying which came first


@dataclass(frozen=True)
class Rank:
    """Where a process stands among its fellows, and where they meet (a torch.distributed init URL).

    ``local_rank`` and ``local_world_size`` count the processes of this machine alone.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str


class RankFailed(RuntimeError):
    """A rank died or raised; the others have been ended.  ``rank`` is the one that failed first."""

    def __init__(self, rank: int, world_size: int, reason: str, details: str) -> None:
        super().__init__(f"rank {rank} of {world_size} {reason}; the other ranks were ended")
        self.rank, self.details = rank, details


def rank_from_environment(environment: Mapping[str, str]) -> Rank | None:
    """This process's place if torchrun or srun started it, as its environment tells; None if nobody did.

    A launcher that started one process only leaves it alone: it may start local ranks of its own.
    """
    e = environment
    if e.get("WORLD_SIZE") == "1" or e.get("SLURM_STEP_NUM_TASKS") == "1":
        return None
    if "RANK" in e and "WORLD_SIZE" in e:
        local_rank, local_world_size = int(e.get("LOCAL_RANK", 0)), int(e.get("LOCAL_WORLD_SIZE", 1))
        return Rank(int(e["RANK"]), int(e["WORLD_SIZE"]), local_rank, local_world_size, "env://")
    if "SLURM_STEP_NODELIST" in e and "SLURM_PROCID" in e:
        host = _first_host(e["SLURM_STEP_NODELIST"])
        port = 20000 + int(e["SLURM_JOB_ID"]) % 20000  # the same on every rank of a job, another for another job
        # Tasks per node, run-length encoded: "2(x3)" or "3,3".  The first count stands for every node.
        local_world_size = int(e["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])
        rank, world_size, local_rank = (
            int(e[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        )
        return Rank(rank, world_size, local_rank, local_world_size, f"tcp://{host}:{port}")
    return None


@cache
def current_rank() -> Rank | None:
    """Return `rank_from_environment` of this process's environment, read at the first call.

    Later calls return the same value without asking ``scontrol`` again.  Tests that change the environment call
    ``current_rank.cache_clear()``.
    """
    return rank_from_environment(os.environ)


def _first_host(nodes: str) -> str:
    listing = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()[0]


def warm_up(modules: Sequence[str]) -> None:
    """Import ``modules`` once, in the process that all ranks are forked from.  Call it early: it returns at once."""
    mp.set_forkserver_preload(list(modules))
    from multiprocessing import forkserver

    forkserver.ensure_running()


def run_ranks(world_size: int, rank_main: Callable[..., Any], *args: Any) -> list[Any]:
    """``rank_main(Rank, *args)`` in ``world_size`` processes; their results by rank (None where there is none).

    ``rank_main`` must be importable by name.  Raises `RankFailed`, after every other rank has been ended, if
    one raises, exits or is killed.  If this process dies, so do the ranks.
    """
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="longctx-") as folder:
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
            with _passed_on(signal.SIGUSR1, processes):
                _wait_for_all(processes, Path(folder))
        finally:
            _end(processes)
        return [_read(Path(folder, f"result{i}")) for i in range(world_size)]


@contextmanager
def _passed_on(number: int, processes: list[ForkServerProcess]) -> Iterator[None]:
    """Whoever signals the recipe means its ranks."""

    def to_all(*_: Any) -> None:
        for process in processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, to_all)
    try:
        yield
    finally:
        signal.signal(number, before)


def _run_one(
    rank: Rank, folder: str, warning_filters: Any, rank_main: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    warnings.filters = warning_filters  # a rank warns, or raises, as its parent would
    parent = mp.parent_process()
    assert parent is not None
    # A parent that is killed cannot end its ranks: they watch it instead.
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks to stop: who can, listens (longctx.train.stop)
    try:
        result = rank_main(rank, *args)
        _write(Path(folder, f"result{rank.rank}"), result)
    except BaseException as error:
        reason = f"raised {type(error).__name__}: {error}"
        _write(Path(folder, f"error{rank.rank}"), (reason, traceback.format_exc(), time.time()))
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own ending, in which a lost peer's background threads can hang.
    os._exit(code)


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _wait_for_all(processes: list[ForkServerProcess], folder: Path) -> None:
    waiting: dict[Any, int] = {process.sentinel: i for i, process in enumerate(processes)}
    failed: list[int] = []  # in the order in which they ended
    until = math.inf
    while waiting and time.monotonic() < until:
        for sentinel in wait(list(waiting), timeout=0.1 if failed else None):
            rank = waiting.pop(sentinel)
            if processes[rank].exitcode:
                failed.append(rank)
                until = min(until, time.monotonic() + _GATHER_S)
    if failed:
        raise _first_failure(processes, failed, folder)


def _first_failure(processes: list[ForkServerProcess], failed: list[int], folder: Path) -> RankFailed:
    """A rank that was killed left no word and comes first; then whoever raised first."""
    silent = [i for i in failed if not Path(folder, f"error{i}").exists()]
    if silent:
        code = processes[silent[0]].exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        missed = [f"rank {i} {error[0]}" for i in failed if (error := _read(Path(folder, f"error{i}")))]
        return RankFailed(silent[0], len(processes), " (".join([how, *missed[:1]]) + ")" * bool(missed), "")
    errors = {i: _read(Path(folder, f"error{i}")) for i in failed}
    first = min(errors, key=lambda i: errors[i][2])
    return RankFailed(first, len(processes), errors[first][0], errors[first][1])


def _end(processes: list[ForkServerProcess]) -> None:
    started = [process for process in processes if process.pid]
    for process in started:
        process.terminate()
    until = time.monotonic() + _GRACE_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.rename(path)


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None
