"""`TimedComm` gives the results and the traffic of the `Comm` inside, and measures how long its rank waits."""

import time

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.dist_comm import DistComm
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.measure.comm_timer import ExposedCommTimer, TimedComm
from longctx.parallel.threads import run_threads
from tests.parallel.test_comm import EXERCISES, Results, exercise


def run_plain_and_timed(comm: Comm) -> tuple[Results, Results, dict[str, float]]:
    """Run every exercise on ``comm`` and on a `TimedComm` around it; also return the seconds of timer."""
    timer = ExposedCommTimer()
    return exercise(comm), exercise(TimedComm(comm, timer)), timer.pop_seconds()


def rank_main(rank: Rank) -> tuple[Results, Results, dict[str, float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)
    try:
        return run_plain_and_timed(DistComm(dist.group.WORLD))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("on", ["threads", "processes"])
def test_timing_changes_neither_results_nor_traffic(on):
    results = (
        run_threads(3, lambda world, rank: run_plain_and_timed(world.group(rank)))
        if on == "threads"
        else run_ranks(3, rank_main)
    )
    assert all(sum(plain[name][1].total for plain, _, _ in results) for name in EXERCISES)
    for plain, timed, seconds in results:
        assert set(seconds) == {"shift", "all_to_all", "all_gather"}
        assert all(waited > 0 for waited in seconds.values())
        for name in EXERCISES:
            (expected, sent), (got, sent_timed) = plain[name], timed[name]
            assert sent_timed == sent, name
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), name


OPERATIONS = {
    "shift": lambda comm, x: comm.shift(x, shapes=[(3,)]).wait(),
    "all_to_all": lambda comm, x: comm.all_to_all([x, x], [(3,), (3,)]),
    "all_gather": lambda comm, x: comm.all_gather(x, [(3,), (3,)]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_early_rank_waits(operation):
    def main(world, rank):
        comm, timer = world.group(rank), ExposedCommTimer()
        comm.all_gather(torch.zeros(3), [(3,), (3,)])  # a barrier
        if rank == 1:
            time.sleep(0.5)
        OPERATIONS[operation](TimedComm(comm, timer), torch.zeros(3))
        return timer.pop_seconds()

    early, late = run_threads(2, main)
    assert set(early) == set(late) == {operation}
    assert early[operation] > 0.4 and late[operation] < early[operation] - 0.2


def test_hidden_communication_is_not_counted():
    def main(world, rank):
        comm, timer = world.group(rank), ExposedCommTimer()
        pending = TimedComm(comm, timer).shift(torch.zeros(3), shapes=[(3,)])
        time.sleep(0.7)
        pending.wait()
        return timer.pop_seconds()

    assert all(seconds["shift"] < 0.35 for seconds in run_threads(2, main))


def test_groups_share_a_timer_and_pop_seconds_resets_it():
    timer = ExposedCommTimer()
    for _ in range(2):
        TimedComm(SingleRankComm(), timer).all_gather(torch.zeros(3), [(3,)])
        with timer.during("shift", torch.device("cpu")):
            time.sleep(0.1)
    assert timer.pop_seconds()["shift"] >= 0.2
    assert timer.pop_seconds() == {}


def test_on_a_gpu_the_time_between_events_counts(monkeypatch):
    """The process's own time between the events does not count.  tests/gpu has the test with real events."""
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
    timer = ExposedCommTimer()
    for _ in range(2):
        with timer.during("shift", torch.device("cuda")):
            time.sleep(0.1)
    assert timer.pop_seconds() == {"shift": pytest.approx((7 + 3) * 1e-3)}
    assert timer.pop_seconds() == {}
