"""Processes over gloo give what threads give, and send the same bytes."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longctx.attention.kernel import reference
from longctx.attention.layout import zigzag
from longctx.parallel.comm import Comm, DistComm, SingleRankComm, Traffic
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import run_threads
from tests import oracle
from tests.parallel.problem import Problem, problem, solve

WORLDS = pytest.mark.parametrize("world", [2, 3])


def parts_of(rank: int, world: int) -> list[torch.Tensor]:
    """What rank sends to each: uneven, of different shapes, and nothing at all to some."""
    return [torch.full((rank, to + 1, 2 * to), 10.0 * rank + to) for to in range(world)]


def shift(comm: Comm) -> list[torch.Tensor]:
    """Two tensors to the next rank, rows by rank: one is a view, and one is empty on the last rank."""
    rows = [5, 1, 2]
    previous, last = (comm.rank - 1) % comm.size, comm.size - 1
    x = torch.arange(rows[comm.rank] * 3.0).view(3, -1).T + 100 * comm.rank
    y = torch.full((2, 0 if comm.rank == last else 4), comm.rank, dtype=torch.bfloat16)
    coming = [(rows[previous], 3), (2, 0 if previous == last else 4)]
    return list(comm.shift(x, y, coming=coming).wait())


def all_to_all(comm: Comm) -> list[torch.Tensor]:
    coming = [tuple(parts_of(source, comm.size)[comm.rank].shape) for source in range(comm.size)]
    return comm.all_to_all(parts_of(comm.rank, comm.size), coming)


def all_gather(comm: Comm) -> list[torch.Tensor]:
    mine = torch.arange(comm.rank * 2).view(2, -1) + 7 * comm.rank  # nothing on rank 0
    return comm.all_gather(mine, [(2, rank) for rank in range(comm.size)])


def task_of(world: int) -> Problem:
    return problem(zigzag(37, world))


def attend(comm: Comm, strategy: str) -> list[torch.Tensor]:
    task = task_of(comm.size)
    ring = Ring(comm, task.queries, task.keys)
    return solve(ring_attention(ring, reference, STRATEGIES[strategy]), task, comm.rank, lambda: comm.traffic)[0]


EXERCISES: dict[str, Callable[[Comm], list[torch.Tensor]]] = {
    "shift": shift,
    "all_to_all": all_to_all,
    "all_gather": all_gather,
    **{name: partial(attend, strategy=name) for name in STRATEGIES},
}

Done = dict[str, tuple[list[torch.Tensor], Traffic]]


def exercise(comm: Comm) -> Done:
    """Every exercise in turn, each with its own traffic."""
    done = {}
    for name, run in EXERCISES.items():
        comm.traffic = Traffic()
        done[name] = (run(comm), comm.traffic)
    return done


def rank_main(rank: Rank) -> tuple[Done, Any]:
    """In a process of its own: the exercises over all ranks, and a shift within a group of the last two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)
    try:
        done = exercise(DistComm(dist.group.WORLD))
        pair = dist.new_group([rank.world_size - 2, rank.world_size - 1])
        inside = rank.rank >= rank.world_size - 2
        return done, within_a_pair(DistComm(pair)) if inside else None
    finally:
        dist.destroy_process_group()


def within_a_pair(comm: Comm) -> tuple[int, int, list[float], list[float]]:
    mine = torch.tensor([float(comm.rank)])
    (shifted,) = comm.shift(mine, coming=[(1,)]).wait()
    gathered = comm.all_gather(mine, [(1,), (1,)])
    return comm.rank, comm.size, shifted.tolist(), torch.cat(gathered).tolist()


@cache
def on_processes(world: int) -> list[tuple[Done, Any]]:
    return run_ranks(world, rank_main)


@cache
def on_threads(world: int) -> list[Done]:
    return run_threads(world, lambda here, rank: exercise(here.group(rank)))


@WORLDS
@pytest.mark.parametrize("name", EXERCISES)
def test_processes_do_what_threads_do(world, name):
    for (processes, _), threads in zip(on_processes(world), on_threads(world), strict=True):
        (got, sent), (expected, expected_sent) = processes[name], threads[name]
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            oracle.assert_close(a, b.double(), 1e-14)
        assert sent == expected_sent


@WORLDS
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attention_over_processes_is_exact(world, strategy):
    task_of(world).assert_solved([done[strategy][0] for done, _ in on_processes(world)], 1e-10)


@WORLDS
def test_all_to_all_sorts_by_sender(world):
    """Against what was sent, not against the threads."""
    for rank, (done, _) in enumerate(on_processes(world)):
        for source, (got, sent) in enumerate(
            zip(done["all_to_all"][0], (parts_of(source, world)[rank] for source in range(world)), strict=True)
        ):
            assert torch.equal(got, sent), f"rank {source} to rank {rank}"


@WORLDS
def test_shift_and_all_gather_bring_the_others_tensors(world):
    for rank, (done, _) in enumerate(on_processes(world)):
        previous = (rank - 1) % world
        (x, y), gathered = done["shift"][0], done["all_gather"][0]
        assert x[0].tolist() == [100 * previous + i * len(x) for i in range(3)]
        assert y.shape == (2, 0 if previous == world - 1 else 4)
        assert (y == previous).all()
        assert [part.tolist() for part in gathered] == [
            (torch.arange(2 * source).view(2, -1) + 7 * source).tolist() for source in range(world)
        ]


def test_a_groups_ranks_are_not_the_worlds():
    """Peers are named within the group: of three ranks, the last two are 0 and 1 of theirs."""
    results = [pair for _, pair in on_processes(3)]
    assert results == [None, (0, 2, [1.0], [0.0, 1.0]), (1, 2, [0.0], [0.0, 1.0])]


def test_what_is_counted_is_what_others_get():
    traffic = Traffic()
    traffic.count("shift", [torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(2, 0), torch.zeros(7)])
    traffic.count("shift", [torch.zeros(0)])
    traffic.count("all_to_all", [torch.zeros(1, dtype=torch.float64)])
    assert traffic.bytes == {"shift": 3 * 5 * 2 + 7 * 4, "all_to_all": 8}
    assert traffic.messages == {"shift": 2, "all_to_all": 1}  # nothing is no message
    assert traffic.total == 66


def test_bytes_of_a_purpose_are_counted_under_it_too():
    traffic = Traffic()
    with traffic.counted_as("attention"):
        traffic.count("all_to_all", [torch.zeros(3)])
        with traffic.counted_as("logits"):
            traffic.count("shift", [torch.zeros(1)])
        traffic.count("all_to_all", [torch.zeros(2)])
    traffic.count("all_to_all", [torch.zeros(5)])
    assert traffic.bytes == {"all_to_all": 40, "shift": 4}
    assert traffic.purposes == {"attention": 20, "logits": 4}


def test_alone_there_is_nobody_to_talk_to():
    comm, x = SingleRankComm(), torch.arange(3)
    with pytest.raises(AssertionError, match="a ring of one communicates nothing"):
        comm.shift(x, coming=[(3,)])
    assert comm.all_to_all([x], [(3,)]) == [x]
    assert comm.all_gather(x, [(3,)]) == [x]
    assert comm.traffic == Traffic()


def test_threads_notice_a_receiver_that_expects_other_shapes():
    """On gloo that would be a hang or garbage."""

    def main(world, rank):
        with pytest.raises(AssertionError, match="expected other shapes"):
            world.group(rank).shift(torch.zeros(3), coming=[(4,)]).wait()
        return rank

    assert run_threads(2, main) == [0, 1]


def test_what_travels_between_threads_is_a_copy():
    """The sender may write to its tensor after ``wait``; the receiver's must not change."""

    def main(world, rank):
        comm, x = world.group(rank), torch.full((1,), rank)
        (got,) = comm.shift(x, coming=[(1,)]).wait()
        x += 10
        comm.all_gather(x, [(1,), (1,)])  # both have written by now
        return got.item()

    assert run_threads(2, main) == [1, 0]
