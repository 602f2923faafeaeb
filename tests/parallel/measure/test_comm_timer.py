"""A measured `Comm` gives and sends what the one inside does, and knows how long its rank waited."""

import time

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.comm import Comm, DistComm, SingleRankComm
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.measure.comm_timer import ExposedCommTimer, TimedComm
from longctx.parallel.threads import run_threads
from tests.parallel.test_comm import EXERCISES, Done, exercise


def both_ways(comm: Comm) -> tuple[Done, Done, dict[str, float]]:
    """Every exercise of a `Comm`, bare and measured, and the seconds."""
    waiting = ExposedCommTimer()
    return exercise(comm), exercise(TimedComm(comm, waiting)), waiting.taken()


def rank_main(rank: Rank) -> tuple[Done, Done, dict[str, float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)
    try:
        return both_ways(DistComm(dist.group.WORLD))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("on", ["threads", "processes"])
def test_nothing_changes_but_that_it_is_measured(on):
    results = (
        run_threads(3, lambda world, rank: both_ways(world.group(rank))) if on == "threads" else run_ranks(3, rank_main)
    )
    assert all(sum(bare[name][1].total for bare, _, _ in results) for name in EXERCISES)
    for bare, measured, seconds in results:
        assert set(seconds) == {"shift", "all_to_all", "all_gather"}
        assert all(taken > 0 for taken in seconds.values())
        for name in EXERCISES:
            (expected, sent), (got, sent_measured) = bare[name], measured[name]
            assert sent_measured == sent, name
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), name


OPERATIONS = {
    "shift": lambda comm, x: comm.shift(x, coming=[(3,)]).wait(),
    "all_to_all": lambda comm, x: comm.all_to_all([x, x], [(3,), (3,)]),
    "all_gather": lambda comm, x: comm.all_gather(x, [(3,), (3,)]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whoever_comes_first_waits(operation):
    def main(world, rank):
        comm, waiting = world.group(rank), ExposedCommTimer()
        comm.all_gather(torch.zeros(3), [(3,), (3,)])  # both are here
        if rank == 1:
            time.sleep(0.5)
        OPERATIONS[operation](TimedComm(comm, waiting), torch.zeros(3))
        return waiting.taken()

    early, late = run_threads(2, main)
    assert set(early) == set(late) == {operation}
    assert early[operation] > 0.4 and late[operation] < early[operation] - 0.2


def test_what_comes_while_a_rank_computes_is_not_waited_for():
    def main(world, rank):
        comm, waiting = world.group(rank), ExposedCommTimer()
        coming = TimedComm(comm, waiting).shift(torch.zeros(3), coming=[(3,)])
        time.sleep(0.7)
        coming.wait()
        return waiting.taken()

    assert all(seconds["shift"] < 0.35 for seconds in run_threads(2, main))


def test_groups_count_together_and_what_was_taken_is_gone():
    waiting = ExposedCommTimer()
    for _ in range(2):
        TimedComm(SingleRankComm(), waiting).all_gather(torch.zeros(3), [(3,)])
        with waiting.during("shift", torch.device("cpu")):
            time.sleep(0.1)
    assert waiting.taken()["shift"] >= 0.2
    assert waiting.taken() == {}


def test_on_a_gpu_the_streams_events_are_read(monkeypatch):
    """What the process does between the events does not matter; tests/gpu has the real ones."""
    clock = iter([5.0, 12.0, 20.0, 23.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, self.done = next(clock), False

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, end) -> float:
            assert end.done
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = ExposedCommTimer()
    for _ in range(2):
        with waiting.during("shift", torch.device("cuda")):
            time.sleep(0.1)
    assert waiting.taken() == {"shift": pytest.approx((7 + 3) * 1e-3)}
    assert waiting.taken() == {}
