"""Ranks return results or raise one clear failure, and no rank survives the call."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from longctx.parallel import launch
from longctx.parallel.comm import LostPeer
from longctx.parallel.launch import Rank, RankFailed, _details, run_ranks

ROOT = Path(__file__).parents[2]
REPORT_S = 20.0  # limit from the failure to the report
GLOO_S = 200  # timeout of a collective: ranks that are not ended would wait this long


def describe_rank(rank: Rank, word: str) -> tuple[str, int, int, int]:
    return word * rank.rank, rank.world_size, rank.local_rank, rank.local_world_size


def write_value(folder: str, name: str, value: float) -> None:
    Path(folder, name).write_text(str(value))


def all_reduce_twice(rank: Rank, folder: str, ending: str, last: int) -> int:
    """Write the process id, and all-reduce twice; before the second time rank ``last`` runs ``ENDINGS[ending]``."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    write_value(folder, f"pid{rank.rank}", os.getpid())
    spec = {"init_method": rank.init_method, "rank": rank.rank, "world_size": rank.world_size}
    dist.init_process_group("gloo", timeout=timedelta(seconds=GLOO_S), **spec)
    total = torch.tensor([rank.rank])
    dist.all_reduce(total)
    if rank.rank == last:
        write_value(folder, "failed_at", time.time())
        ENDINGS[ending]()
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def garbage_collection(_: Rank) -> tuple[bool, int, int]:
    return gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects())


def raises() -> None:
    raise LookupError("no such layer")


def unpicklable() -> None:
    class Local(Exception):
        pass

    raise Local("made here")


ENDINGS = {
    "well": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(3),
    "exits well": lambda: os._exit(0),
    "raises": raises,
    "unpicklable": unpicklable,
    "leaves": lambda: sys.exit("enough"),
}


def wait_forever(rank: Rank, folder: str, on_sigterm: signal.Handlers = signal.SIG_IGN) -> None:
    """Write the process id to the named pipe ``started``, and wait for ever with handler ``on_sigterm``."""
    signal.signal(signal.SIGTERM, on_sigterm)
    write_value(folder, f"pid{rank.rank}", os.getpid())
    with Path(folder, "started").open("w") as started:
        started.write(f"{os.getpid()}\n")
    while True:
        signal.pause()


def fail_while_others_wait(rank: Rank, folder: str, on_sigterm: signal.Handlers) -> None:
    """Rank 0 raises once another rank has started; the others wait for ever."""
    if rank.rank:
        wait_forever(rank, folder, on_sigterm)
    with Path(folder, "started").open() as started:
        started.readline()
    write_value(folder, "failed_at", time.time())
    raises()


def alive(folder: Path) -> list[str]:
    """Return the process ids in ``folder`` that still run."""
    return [pid for pid in (file.read_text() for file in folder.glob("pid*")) if Path("/proc", pid).exists()]


def ends_within(pid: int, seconds: float) -> bool:
    """Return True if process ``pid`` ends within ``seconds``; it need not be a child."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(wait([process], seconds))
    finally:
        os.close(process)


@pytest.mark.parametrize("world", [1, 3])
def test_results_are_in_rank_order(world):
    assert run_ranks(world, describe_rank, "ab") == [("ab" * i, world, i, world) for i in range(world)]


def test_ranks_find_each_other(tmp_path):
    assert run_ranks(3, all_reduce_twice, str(tmp_path), "well", 0) == [9] * 3
    assert len(list(tmp_path.glob("pid*"))) == 3 and not alive(tmp_path)


@pytest.mark.parametrize(
    ("ending", "message", "details"),
    [
        ("killed", r"rank 1 of 3 was killed by SIGKILL \(rank [02] raised .*\); the other ranks were ended", ""),
        ("exits", r"rank 1 of 3 exited with 3 \(rank [02] raised .*\); the other ranks were ended", ""),
        ("exits well", "rank 1 of 3 exited with 0 before it had a result", ""),
        ("raises", "rank 1 of 3 raised LookupError: no such layer", "in raises"),
        ("unpicklable", "rank 1 of 3 raised Local: made here", "in unpicklable"),
        ("leaves", "rank 1 of 3 raised SystemExit: enough", "in all_reduce_twice"),
    ],
)
def test_failed_rank_is_named_and_waiting_ranks_are_ended(tmp_path, ending, message, details):
    with pytest.raises(RankFailed, match=message) as failed:
        run_ranks(3, all_reduce_twice, str(tmp_path), ending, 1)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < REPORT_S
    assert failed.value.rank == 1
    assert details in failed.value.details
    assert len(list(tmp_path.glob("pid*"))) == 3 and not alive(tmp_path)


@pytest.mark.parametrize(("on_sigterm", "grace_s"), [(signal.SIG_DFL, 2 * REPORT_S), (signal.SIG_IGN, 0.5)])
def test_waiting_rank_gets_sigterm_and_then_sigkill(tmp_path, monkeypatch, on_sigterm, grace_s):
    monkeypatch.setattr(launch, "_GRACE_S", grace_s)
    os.mkfifo(tmp_path / "started")
    with pytest.raises(RankFailed, match="rank 0 of 2 raised LookupError"):
        run_ranks(2, fail_while_others_wait, str(tmp_path), on_sigterm)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < REPORT_S
    assert (tmp_path / "pid1").exists() and not alive(tmp_path)


@pytest.fixture
def scratch():
    """A folder for files that a killed process leaves, with a short name because its sockets' paths are limited."""
    with tempfile.TemporaryDirectory(prefix="killed-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_parent_that_is_killed_leaves_no_rank_and_no_file(tmp_path, scratch, number):
    os.mkfifo(tmp_path / "started")
    script = (
        "import signal, sys; from recipes.common import cli; signal.signal(signal.SIGTERM, cli._exit_on_sigterm);"
        f"from tests.parallel.test_launch import run_ranks, wait_forever; run_ranks(2, wait_forever, {str(tmp_path)!r},"
        "signal.SIG_DFL)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"TMPDIR": scratch})
    try:
        # Open for writing too, so that the pipe does not end between the two ranks' lines.
        with os.fdopen(os.open(tmp_path / "started", os.O_RDWR)) as started:
            pids = [int(started.readline()) for _ in range(2)]
        assert len(list(Path(scratch).iterdir())) == 1
        parent.send_signal(number)
        code = parent.wait(REPORT_S)
    finally:
        parent.kill()
        parent.wait()
    for pid in (survivors := [pid for pid in pids if not ends_within(pid, REPORT_S)]):
        os.kill(pid, signal.SIGKILL)
    assert not survivors
    assert code == (128 + number if number == signal.SIGTERM else -number)
    assert not list(Path(scratch).iterdir())


@pytest.mark.parametrize(("world", "options"), [(1, {}), (3, {"ended_others": False})])
def test_failure_claims_no_ended_ranks_if_there_are_none(world, options):
    assert str(RankFailed(0, world, "raised E: x", "", **options)) == f"rank 0 of {world} raised E: x"


def test_lost_peer_is_reported_without_its_traceback():
    assert _details(LostPeer("lost rank 3")) == ""
    assert "ValueError: x" in _details(ValueError("x"))


def test_garbage_collection_in_a_rank_ignores_what_the_server_has_imported():
    [(enabled, ignored, others)] = run_ranks(1, garbage_collection)
    assert enabled and ignored > 100_000 and others < 10_000


def test_long_tmpdir_does_not_break_the_sockets_of_ranks(tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    code = "from longctx.parallel.launch import _choose_temp_dir; from multiprocessing.util import get_temp_dir; "
    code += "_choose_temp_dir(); print(get_temp_dir())"
    environment = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.strip()) <= launch._LONGEST_TEMP_DIR + len("/pymp-12345678")


def test_source_that_ranks_cannot_find_is_refused(tmp_path, monkeypatch):
    """They would import another copy."""
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "a:b" / "longctx" / "parallel" / "launch.py"))
    with pytest.raises(ValueError, match=r"longctx is in \S+/a:b: .*: rename the folder"):
        run_ranks(1, describe_rank, "word")
