"""`Comm` over gloo processes gives the results of `Comm` over threads and sends the same bytes."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longctx.attention.kernel import reference
from longctx.attention.layout import zigzag
from longctx.parallel.comm import Comm, LostPeer, SingleRankComm, Traffic, sum_over_ranks
from longctx.parallel.dist_comm import DistComm
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import run_threads
from tests import oracle
from tests.parallel.problem import Problem, problem, solve

WORLDS = pytest.mark.parametrize("world", [2, 3])


def parts_from(rank: int, world: int) -> list[torch.Tensor]:
    """Return the tensors that ``rank`` sends to each rank: of different shapes, some of them empty."""
    return [torch.full((rank, to + 1, 2 * to), 10.0 * rank + to) for to in range(world)]


def shift(comm: Comm) -> list[torch.Tensor]:
    """Send two tensors to the next rank: a view of uneven rows, and one that is empty on the last rank."""
    rows = [5, 1, 2]
    previous, last = (comm.rank - 1) % comm.size, comm.size - 1
    x = torch.arange(rows[comm.rank] * 3.0).view(3, -1).T + 100 * comm.rank
    y = torch.full((2, 0 if comm.rank == last else 4), comm.rank, dtype=torch.bfloat16)
    shapes = [(rows[previous], 3), (2, 0 if previous == last else 4)]
    return list(comm.shift(x, y, shapes=shapes).wait())


def all_to_all(comm: Comm) -> list[torch.Tensor]:
    shapes = [tuple(parts_from(source, comm.size)[comm.rank].shape) for source in range(comm.size)]
    return comm.all_to_all(parts_from(comm.rank, comm.size), shapes)


def all_to_all_small(comm: Comm) -> list[torch.Tensor]:
    shapes = [tuple(parts_from(source, comm.size)[comm.rank].shape) for source in range(comm.size)]
    return comm.all_to_all(parts_from(comm.rank, comm.size), shapes, small=True)


def all_gather(comm: Comm) -> list[torch.Tensor]:
    mine = torch.arange(comm.rank * 2).view(2, -1) + 7 * comm.rank  # empty on rank 0
    return comm.all_gather(mine, [(2, rank) for rank in range(comm.size)])


def all_gather_even(comm: Comm) -> list[torch.Tensor]:
    return comm.all_gather(torch.arange(6).view(3, 2).T + 7 * comm.rank, [(2, 3)] * comm.size)


def all_gather_large(comm: Comm) -> list[torch.Tensor]:
    """Gather tensors of different lengths that are too large to be padded."""
    return comm.all_gather(torch.full((40_000 * comm.rank,), comm.rank), [(40_000 * r,) for r in range(comm.size)])


def sum_of_bfloat16(comm: Comm) -> list[torch.Tensor]:
    """Sum 256 + 1 + ... + 1 over the ranks; rounding each partial sum to bfloat16 would give 256."""
    return [sum_over_ranks(comm, torch.full((3, 1), 1.0 if comm.rank else 256.0, dtype=torch.bfloat16))]


def task_for(world: int) -> Problem:
    return problem(zigzag(37, world))


def attend(comm: Comm, strategy: str) -> list[torch.Tensor]:
    task = task_for(comm.size)
    ring = Ring(comm, task.queries, task.keys)
    return solve(ring_attention(ring, reference, STRATEGIES[strategy]), task, comm.rank, lambda: comm.traffic)[0]


EXERCISES: dict[str, Callable[[Comm], list[torch.Tensor]]] = {
    "shift": shift,
    "all_to_all": all_to_all,
    "all_to_all small": all_to_all_small,
    "all_gather": all_gather,
    "all_gather even": all_gather_even,
    "all_gather large": all_gather_large,
    "sum": sum_of_bfloat16,
    **{name: partial(attend, strategy=name) for name in STRATEGIES},
}

Results = dict[str, tuple[list[torch.Tensor], Traffic]]


def exercise(comm: Comm) -> Results:
    """Run every exercise and return its tensors and its traffic."""
    results = {}
    for name, run in EXERCISES.items():
        comm.traffic = Traffic()
        results[name] = (run(comm), comm.traffic)
    return results


def rank_main(rank: Rank) -> tuple[Results, Results, Any]:
    """Run the exercises over all ranks, with and without sockets, and `exchange_in_pair` in the last two's group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)
    try:
        comm, gloo = DistComm(dist.group.WORLD), DistComm(dist.group.WORLD)
        gloo._sockets = None  # as between machines
        results = exercise(comm), exercise(gloo)
        assert comm._sockets is not None
        comm.close()
        pair = dist.new_group([rank.world_size - 2, rank.world_size - 1])
        is_member = rank.rank >= rank.world_size - 2
        return *results, exchange_in_pair(DistComm(pair, timeout_s=0.1)) if is_member else None
    finally:
        dist.destroy_process_group()


def exchange_in_pair(comm: DistComm) -> tuple[int, int, list[float], list[float]]:
    """Return the rank in the group, its size, and the results of a shift and an all-gather.

    Then rank 0 waits in an all-gather for rank 1, which does not answer, but waits in a barrier.
    """
    mine = torch.tensor([float(comm.rank)])
    (shifted,) = comm.shift(mine, shapes=[(1,)]).wait()
    gathered = comm.all_gather(mine, [(1,), (1,)])
    if comm.rank == 0:
        silent = dist.get_global_rank(comm.group, 1)
        with pytest.raises(LostPeer, match=rf"^lost rank {silent} \(no answer within run.timeout_minutes\)$"):
            comm.all_gather(mine, [(1,), (1,)])
    dist.barrier(comm.group)
    return comm.rank, comm.size, shifted.tolist(), torch.cat(gathered).tolist()


@cache
def on_processes(world: int) -> list[tuple[Results, Results, Any]]:
    return run_ranks(world, rank_main)


@cache
def on_threads(world: int) -> list[Results]:
    return run_threads(world, lambda threads, rank: exercise(threads.group(rank)))


@WORLDS
@pytest.mark.parametrize("name", EXERCISES)
def test_processes_match_threads(world, name):
    for (processes, over_gloo, _), threads in zip(on_processes(world), on_threads(world), strict=True):
        (got, sent), (gloo, gloo_sent), (expected, expected_sent) = processes[name], over_gloo[name], threads[name]
        assert len(got) == len(gloo) == len(expected)
        for a, b, c in zip(got, expected, gloo, strict=True):
            assert a.dtype == b.dtype == c.dtype
            oracle.assert_close(a, b.double(), 1e-14)
            assert torch.equal(a, c), "the same bits, whatever they travel over"
        assert sent == gloo_sent == expected_sent


@WORLDS
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attention_over_processes_is_exact(world, strategy):
    task_for(world).assert_solved([results[strategy][0] for results, *_ in on_processes(world)], 1e-10)


@WORLDS
def test_all_to_all_returns_tensors_in_rank_order(world):
    """Compared with the tensors that were sent, not with the threads' results."""
    for rank, (results, *_) in enumerate(on_processes(world)):
        assert all(map(torch.equal, results["all_to_all"][0], results["all_to_all small"][0]))
        for source, (got, sent) in enumerate(
            zip(results["all_to_all"][0], (parts_from(source, world)[rank] for source in range(world)), strict=True)
        ):
            assert torch.equal(got, sent), f"rank {source} to rank {rank}"


@WORLDS
def test_shift_and_all_gather_receive_the_other_ranks_tensors(world):
    for rank, (results, *_) in enumerate(on_processes(world)):
        previous = (rank - 1) % world
        (x, y), gathered = results["shift"][0], results["all_gather"][0]
        assert x[0].tolist() == [100 * previous + i * len(x) for i in range(3)]
        assert y.shape == (2, 0 if previous == world - 1 else 4)
        assert (y == previous).all()
        assert [part.tolist() for part in gathered] == [
            (torch.arange(2 * source).view(2, -1) + 7 * source).tolist() for source in range(world)
        ]


@WORLDS
def test_sum_is_rounded_once(world):
    for results, *_ in on_processes(world):
        assert results["sum"][0][0].tolist() == [[258.0 if world == 3 else 256.0]] * 3


def test_ranks_are_counted_within_the_group():
    """In the group of the last two of three ranks, these are ranks 0 and 1."""
    results = [pair for *_, pair in on_processes(3)]
    assert results == [None, (0, 2, [1.0], [0.0, 1.0]), (1, 2, [0.0], [0.0, 1.0])]


def test_traffic_counts_bytes_and_messages_by_operation():
    traffic = Traffic()
    traffic.count("shift", [torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(2, 0), torch.zeros(7)])
    traffic.count("shift", [torch.zeros(0)])
    traffic.count("all_to_all", [torch.zeros(1, dtype=torch.float64)])
    assert traffic.bytes == {"shift": 3 * 5 * 2 + 7 * 4, "all_to_all": 8}
    assert traffic.messages == {"shift": 2, "all_to_all": 1}  # an empty tensor is no message
    assert traffic.total == 66


def test_counted_as_also_counts_bytes_by_purpose():
    traffic = Traffic()
    with traffic.counted_as("attention"):
        traffic.count("all_to_all", [torch.zeros(3)])
        with traffic.counted_as("logits"):
            traffic.count("shift", [torch.zeros(1)])
        traffic.count("all_to_all", [torch.zeros(2)])
    traffic.count("all_to_all", [torch.zeros(5)])
    assert traffic.bytes == {"all_to_all": 40, "shift": 4}
    assert traffic.purposes == {"attention": 20, "logits": 4}


def test_single_rank_comm_sends_nothing():
    comm, x = SingleRankComm(), torch.arange(3)
    with pytest.raises(AssertionError, match="a ring of one communicates nothing"):
        comm.shift(x, shapes=[(3,)])
    assert comm.all_to_all([x], [(3,)]) == [x]
    assert comm.all_gather(x, [(3,)]) == [x]
    assert comm.traffic == Traffic()


def test_thread_comm_refuses_unexpected_shapes():
    """Over gloo, wrong shapes would hang or corrupt data."""

    def main(world, rank):
        with pytest.raises(AssertionError, match="expected other shapes"):
            world.group(rank).shift(torch.zeros(3), shapes=[(4,)]).wait()
        return rank

    assert run_threads(2, main) == [0, 1]


def test_thread_comm_sends_copies():
    """The sender may write to its tensor after ``wait``; the receiver's tensor must not change."""

    def main(world, rank):
        comm, x = world.group(rank), torch.full((1,), rank)
        (got,) = comm.shift(x, shapes=[(1,)]).wait()
        x += 10
        comm.all_gather(x, [(1,), (1,)])  # a barrier: both have written by now
        return got.item()

    assert run_threads(2, main) == [1, 0]
