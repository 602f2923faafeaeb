"""Ring attention on threads: exact for every strategy, layout and number of ranks, with the bytes of the papers."""

import weakref

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel, reference
from longctx.attention.layout import contiguous, documents, shard_balanced, striped, zigzag
from longctx.parallel.comm import Comm, Pending
from longctx.parallel.ring import Ring, rotate
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadComm, ThreadWorld, run_threads
from tests import oracle
from tests.parallel.problem import B, Problem, on_threads, problem, solve
from tests.turns import decoded_tokens, grown

RANKS = [1, 2, 3, 4, 5]
# Each number of ranks with one or two (query, KV) head counts, and each head count with at least two numbers of ranks.
GROUPS = [*((n, (6, 2)) for n in RANKS), (3, (3, 3)), (4, (3, 3)), (2, (4, 1)), (5, (4, 1))]
LAYOUTS = {
    "contiguous": lambda size: contiguous(23, size),
    "zigzag": lambda size: zigzag(37, size),
    "zigzag, even": lambda size: zigzag(6 * size, size),
    "zigzag, 1 row": lambda size: zigzag(1, size),  # the other ranks have no rows
    "striped": lambda size: striped(31, size),
    "documents": lambda size: documents([7, 0, 1, 13], size),
    "striped documents": lambda size: documents([1, 6, 0], size, striped),
}

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
all_layouts = pytest.mark.parametrize("name", LAYOUTS)
all_ranks = pytest.mark.parametrize("ranks", RANKS)


def attended_pairs(ring: Ring) -> list[int]:
    """Return the number of scores that each rank computes."""
    size = ring.comm.size
    return [sum(tile.pairs for k in range(size) for tile in ring.tiles(q, k)) for q in range(size)]


def solve_on_ring(task: Problem, strategy: str, kernel: Kernel = reference):
    """Return each rank's results and traffic."""

    def attention_on(comm: Comm):
        return ring_attention(Ring(comm, task.queries, task.keys), kernel, STRATEGIES[strategy])

    return on_threads(task, attention_on)


@strategies
@all_layouts
@pytest.mark.parametrize(("ranks", "heads"), GROUPS, ids=str)
def test_forward_and_backward(strategy, name, ranks, heads):
    task = problem(LAYOUTS[name](ranks), heads=heads)
    results, _ = solve_on_ring(task, strategy)
    task.assert_solved(results, 1e-10)


@strategies
@all_layouts
@pytest.mark.parametrize("ranks", [1, 3])
def test_flash_cpu_in_float32(strategy, name, ranks):
    task = problem(LAYOUTS[name](ranks), dtype=torch.float32)
    results, _ = solve_on_ring(task, strategy, flash_cpu)
    task.assert_solved(results, 2e-6)


CONVERSATIONS = {
    "a second prompt": lambda n: [zigzag(19, n), zigzag(11, n)],
    "a decoded token": lambda n: [zigzag(19, n), *decoded_tokens(19, 1, n)],
    "the eighth token": lambda n: [zigzag(19, n), *decoded_tokens(19, 8, n)],
    "a prompt after an answer": lambda n: [zigzag(19, n), *decoded_tokens(19, 7, n), striped(13, n)],
    "chunked prefill": lambda n: [contiguous(7, n), zigzag(7, n), zigzag(5, n)],
    "documents continue": lambda n: [documents([7, 0, 5], n), documents([3, 11, 0], n, striped)],
}


@strategies
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_later_turn_over_the_cache(strategy, name, ranks):
    *earlier, last = CONVERSATIONS[name](ranks)
    queries = last.after(grown(earlier))
    task = problem(queries, grown(earlier).then(queries))
    results, _ = solve_on_ring(task, strategy)
    task.assert_solved(results, 1e-10)


# Bytes and messages that each rank sends, by operation: arXiv 2411.01783, Table 3 and section 3.5, for uneven rows.
# ``kv`` and ``q`` are rows by rank, ``e`` the bytes of an element, ``acc`` the bytes in the accumulation dtype.


def forwarded_rows(rows: list[int], rank: int) -> list[int]:
    """Return the rows of the blocks that ``rank`` sends: all blocks except for the next rank's."""
    return [n for owner, n in enumerate(rows) if owner != (rank + 1) % len(rows)]


def messages(rows: list[int]) -> int:
    return sum(n > 0 for n in rows)


def forward_traffic(strategy, rank, q, kv, hq, hk, d, e, acc):
    if strategy == "pass_kv":
        sent = forwarded_rows(kv, rank)
        return {"shift": 2 * sum(sent) * B * hk * d * e}, {"shift": 2 * messages(sent)}
    if strategy == "all_gather_kv":
        others = len(kv) - 1
        return {"all_to_all": others * 2 * kv[rank] * B * hk * d * e}, {"all_to_all": others * (kv[rank] > 0)}
    sent, others = forwarded_rows(q, rank), [n for owner, n in enumerate(q) if owner != rank]
    return (
        {"shift": sum(sent) * B * hq * d * e, "all_to_all": sum(others) * B * hq * (d + 1) * acc},
        {"shift": messages(sent), "all_to_all": messages(others)},
    )


def backward_traffic(rank, kv, hk, d, e, acc):
    """Return the bytes and messages that ``rank`` sends in the backward of pass-KV.

    Keys and values travel again; the sums of each owner's two gradients travel one hop more, back to the owner.
    """
    sent = forwarded_rows(kv, rank)
    width = 2 * B * hk * d
    return sum(sent) * width * e + sum(kv) * width * acc, 2 * messages(sent) + 2 * messages(kv)


@strategies
@pytest.mark.parametrize("name", ["zigzag", "zigzag, 1 row", "documents"])
@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize(
    ("dtype", "e", "acc"), [(torch.bfloat16, 2, 4), (torch.float32, 4, 4), (torch.float64, 8, 8)], ids=str
)
def test_bytes_and_messages(strategy, name, ranks, dtype, e, acc):
    (hq, hk), d = (6, 2), 5
    earlier = zigzag(11, ranks)
    layout = LAYOUTS[name](ranks)
    queries = layout if len(layout.lengths) > 1 else layout.after(earlier)
    keys = layout if len(layout.lengths) > 1 else earlier.then(queries)
    _, traffic = solve_on_ring(problem(queries, keys, (hq, hk), d, dtype), strategy)
    q, kv = ([layout.rows(r) for r in range(ranks)] for layout in (queries, keys))
    for rank, (forward, total) in enumerate(traffic):
        expected = forward_traffic(strategy, rank, q, kv, hq, hk, d, e, acc)
        assert (forward.bytes, forward.messages) == expected
        more_bytes, more_messages = backward_traffic(rank, kv, hk, d, e, acc)
        assert total.bytes == expected[0] | {"shift": expected[0].get("shift", 0) + more_bytes}
        assert total.messages == expected[1] | {"shift": expected[1].get("shift", 0) + more_messages}


@strategies
def test_ring_of_one_sends_nothing(strategy):
    _, [[_, total]] = solve_on_ring(problem(zigzag(7, 1)), strategy)
    assert (total.bytes, total.messages, total.total) == ({}, {}, 0)


@strategies
@pytest.mark.parametrize("heads", [(8, 8), (6, 2), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_three_turns_of_a_ragged_batch(strategy, heads, ranks):
    """Numbers of ranks x GQA ratios 1, 3, 4 and 8; sequences of different T and P, balanced turn by turn."""
    turns, cached = [[29, 1, 13], [5, 17, 0], [2, 0, 23]], [0] * ranks
    cache = None
    for lengths in turns:
        layout = shard_balanced(lengths, zigzag, cached)
        queries = layout.after(cache) if cache else layout
        cache = cache.then(queries) if cache else queries
        cached = [cache.rows(rank) for rank in range(ranks)]
        task = problem(queries, cache, heads=heads)
        results, _ = solve_on_ring(task, strategy)
        task.assert_solved(results, 1e-10)
        assert max(cached) - min(cached) <= 29 // (2 * ranks) + 1


@all_ranks
def test_rotate_yields_every_owner_once_and_its_own_first(ranks):
    layout = contiguous(3 * ranks - 1, ranks)

    def rank_main(world, rank):
        local = torch.full((1, layout.rows(rank)), rank)
        return [(owner, x.tolist()) for owner, (x,) in rotate(world.group(rank), layout, local)]

    for rank, turns in enumerate(run_threads(ranks, rank_main)):
        owners = [(rank - step) % ranks for step in range(ranks)]
        assert turns == [(owner, [[owner] * layout.rows(owner)]) for owner in owners]


class Preallocating(ThreadComm):
    """A `ThreadComm` that allocates a block when its receive is posted, as torch.distributed does, and counts them."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        super().__init__(world, rank, tuple(range(world.size)))
        self.blocks: list[list[weakref.ref]] = []
        self.max_alive = 0

    def shift(self, *mine, shapes) -> Pending:
        received = tuple(x.new_empty(shape) for x, shape in zip(mine, shapes, strict=True))
        self.blocks.append([weakref.ref(x) for x in received])
        self.max_alive = max(self.max_alive, self.alive)
        return _PostedReceive(super().shift(*mine, shapes=shapes), received, mine)

    @property
    def alive(self) -> int:
        return sum(any(ref() is not None for ref in block) for block in self.blocks)


class _PostedReceive:
    def __init__(self, pending: Pending, received, sent) -> None:
        self.pending, self.received = pending, received
        self.sent = sent  # kept alive as in `DistComm`, whose backend reads them until they have been sent

    def wait(self):
        for buffer, tensor in zip(self.received, self.pending.wait(), strict=True):
            buffer.copy_(tensor)
        return self.received


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_two_buffers_for_any_number_of_ranks(strategy, ranks):
    """During the computation on a block, that block and the next are alive; the next is in flight (overlap)."""
    task = problem(zigzag(8 * ranks, ranks))

    def rank_main(world, rank):
        comm, alive = Preallocating(world, rank), []

        def forward(q, k, v, causal):
            alive.append(comm.alive)
            return reference.forward(q, k, v, causal)

        ring = Ring(comm, task.queries, task.keys)
        with torch.no_grad():
            STRATEGIES[strategy](*task.of(rank)[:3], ring, Kernel("counting", forward, reference.backward))
        return alive, comm.max_alive

    for alive, max_alive in run_threads(ranks, rank_main):  # one tile a step; a rank's own block is no received one
        assert alive == [1] + [2] * (ranks - 2) + [1]
        assert max_alive == min(2, ranks - 1), "a third block was alive when a receive was posted"


def test_four_buffers_in_the_backward():
    """Two for keys and values, and two for the sums of their gradients."""
    task = problem(zigzag(40, 5))

    def rank_main(world, rank):
        comm = Preallocating(world, rank)
        ring = Ring(comm, task.queries, task.keys)
        solve(ring_attention(ring, reference, STRATEGIES["pass_kv"]), task, rank, lambda: comm.traffic)
        return comm.max_alive

    assert max(run_threads(5, rank_main)) <= 4


@all_layouts
@all_ranks
def test_attended_pairs_equal_the_masks(name, ranks):
    layout = LAYOUTS[name](ranks)
    rows = oracle.pack_rows(layout.lengths)
    mask = oracle.visible(rows, rows)
    ring = Ring(ThreadWorld(ranks).group(0), layout, layout)
    assert list(attended_pairs(ring)) == [int(mask[layout.index(rank)].sum()) for rank in range(ranks)]
