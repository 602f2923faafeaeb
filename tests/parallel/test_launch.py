"""Ranks give results or one clear failure; whatever happens, none of them is left behind."""

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
from longctx.parallel.launch import Rank, RankFailed, current_rank, rank_from_environment, run_ranks

ROOT = Path(__file__).parents[2]
SOON_S = 20.0  # from the failure to the report
GLOO_S = 200  # how long a collective would wait that nobody ends


def answers(rank: Rank, word: str) -> tuple[str, int, int, int]:
    return word * rank.rank, rank.world_size, rank.local_rank, rank.local_world_size


def said(folder: str, name: str, value: float) -> None:
    Path(folder, name).write_text(str(value))


def meets(rank: Rank, folder: str, ends: str, last: int) -> int:
    """Leave a process id, meet the others in an all-reduce; then rank ``last`` ends while they wait for it."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    said(folder, f"pid{rank.rank}", os.getpid())
    spec = {"init_method": rank.init_method, "rank": rank.rank, "world_size": rank.world_size}
    dist.init_process_group("gloo", timeout=timedelta(seconds=GLOO_S), **spec)
    total = torch.tensor([rank.rank])
    dist.all_reduce(total)
    if rank.rank == last:
        said(folder, "failed_at", time.time())
        ENDS[ends]()
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def raises() -> None:
    raise LookupError("no such layer")


def unpicklable() -> None:
    class Local(Exception):
        pass

    raise Local("made here")


ENDS = {
    "well": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(3),
    "raises": raises,
    "unpicklable": unpicklable,
    "leaves": lambda: sys.exit("enough"),
}


def waits(rank: Rank, folder: str, on_sigterm: signal.Handlers = signal.SIG_IGN) -> None:
    """Say that we are there to the named pipe ``born``, and wait for ever, deaf to SIGTERM or not."""
    signal.signal(signal.SIGTERM, on_sigterm)
    said(folder, f"pid{rank.rank}", os.getpid())
    with Path(folder, "born").open("w") as born:
        born.write(f"{os.getpid()}\n")
    while True:
        signal.pause()


def fails_beside_one_that_waits(rank: Rank, folder: str, on_sigterm: signal.Handlers) -> None:
    if rank.rank:
        waits(rank, folder, on_sigterm)
    with Path(folder, "born").open() as born:
        born.readline()
    said(folder, "failed_at", time.time())
    raises()


def alive(folder: Path) -> list[str]:
    return [pid for pid in (file.read_text() for file in folder.glob("pid*")) if Path("/proc", pid).exists()]


def ended(pid: int, within_s: float) -> bool:
    """Whether process ``pid``, of whatever parent, ends in time."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(wait([watched], within_s))
    finally:
        os.close(watched)


@pytest.mark.parametrize("world", [1, 3])
def test_results_come_by_rank(world):
    assert run_ranks(world, answers, "ab") == [("ab" * i, world, i, world) for i in range(world)]


def test_ranks_meet(tmp_path):
    assert run_ranks(3, meets, str(tmp_path), "well", 0) == [9] * 3
    assert len(list(tmp_path.glob("pid*"))) == 3 and not alive(tmp_path)


@pytest.mark.parametrize(
    ("ends", "words", "details"),
    [
        ("killed", r"rank 1 of 3 was killed by SIGKILL \(rank [02] raised .*\); the other ranks were ended", ""),
        ("exits", r"rank 1 of 3 exited with 3 \(rank [02] raised .*\); the other ranks were ended", ""),
        ("raises", "rank 1 of 3 raised LookupError: no such layer", "in raises"),
        ("unpicklable", "rank 1 of 3 raised Local: made here", "in unpicklable"),
        ("leaves", "rank 1 of 3 raised SystemExit: enough", "in meets"),
    ],
)
def test_the_rank_that_fails_is_named_and_the_waiting_ones_end(tmp_path, ends, words, details):
    with pytest.raises(RankFailed, match=words) as failed:
        run_ranks(3, meets, str(tmp_path), ends, 1)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < SOON_S
    assert failed.value.rank == 1
    assert details in failed.value.details
    assert len(list(tmp_path.glob("pid*"))) == 3 and not alive(tmp_path)


@pytest.mark.parametrize(("on_sigterm", "grace_s"), [(signal.SIG_DFL, 2 * SOON_S), (signal.SIG_IGN, 0.5)])
def test_a_rank_that_waits_is_asked_to_end_and_then_killed(tmp_path, monkeypatch, on_sigterm, grace_s):
    monkeypatch.setattr(launch, "_GRACE_S", grace_s)
    os.mkfifo(tmp_path / "born")
    with pytest.raises(RankFailed, match="rank 0 of 2 raised LookupError"):
        run_ranks(2, fails_beside_one_that_waits, str(tmp_path), on_sigterm)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < SOON_S
    assert (tmp_path / "pid1").exists() and not alive(tmp_path)


@pytest.fixture
def scratch():
    """What a killed process leaves behind goes here; of a short name, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="killed-", ignore_cleanup_errors=True) as folder:
        yield folder


def test_when_the_parent_is_killed_its_ranks_end(tmp_path, scratch):
    os.mkfifo(tmp_path / "born")
    script = f"from tests.parallel.test_launch import run_ranks, waits; run_ranks(2, waits, {str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"TMPDIR": scratch})
    try:
        # Open for writing too, so that it does not end between one rank's word and the next.
        with os.fdopen(os.open(tmp_path / "born", os.O_RDWR)) as born:
            pids = [int(born.readline()) for _ in range(2)]
    finally:
        parent.kill()
        parent.wait()
    for pid in (left := [pid for pid in pids if not ended(pid, SOON_S)]):
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_nobody_started_this_process():
    assert rank_from_environment({}) is None
    assert rank_from_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None, "a batch script, not a step"


@pytest.mark.parametrize("alone", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_launcher_of_one_process_leaves_it_alone(alone):
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n17", **alone}) is None


def test_torchrun_started_this_process():
    torchrun = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert rank_from_environment(torchrun) == Rank(5, 7, 1, 3, "env://")
    assert rank_from_environment({"RANK": "5", "WORLD_SIZE": "7"}) == Rank(5, 7, 0, 1, "env://")


@pytest.mark.parametrize(("tasks_per_node", "neighbours"), [("2(x3)", 2), ("3,3", 3), ("6", 6)])
def test_srun_started_this_process(monkeypatch, tasks_per_node, neighbours):
    def scontrol(command, **_):
        assert command == ["scontrol", "show", "hostnames", "n[17-19]"]
        return subprocess.CompletedProcess(command, 0, "n17\nn18\nn19\n", "")

    monkeypatch.setattr(subprocess, "run", scontrol)
    srun = {
        "SLURM_JOB_ID": "41003",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[17-19]",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }
    assert rank_from_environment(srun) == Rank(5, 6, 1, neighbours, "tcp://n17:21003")


def test_current_rank_reads_the_environment_once(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "rank_from_environment", lambda environment: calls.append(environment["RANK"]))
    monkeypatch.setenv("RANK", "5")
    current_rank.cache_clear()
    try:
        assert [current_rank(), current_rank()] == [None, None]
        assert calls == ["5"]
        current_rank.cache_clear()
        current_rank()
        assert calls == ["5", "5"]
    finally:
        current_rank.cache_clear()
