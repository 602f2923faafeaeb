"""The ring on threads: exact for every strategy, layout and number of ranks, and with the bytes of the papers."""

import weakref

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel, attend_tiles, reference
from longctx.attention.layout import Layout, contiguous, documents, shard_balanced, single, striped, zigzag
from longctx.attention.mask import Mask
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.parallel.comm import Comm, Pending
from longctx.parallel.ring import Ring, gather_merge, rotate
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadComm, ThreadWorld, run_threads
from longctx.parallel.ulysses import share_of_heads
from tests import oracle
from tests.parallel.problem import B, Problem, on_threads, problem, solve
from tests.turns import grown

RANKS = [1, 2, 3, 4, 5]
# Each number of ranks, and each way of sharing KV heads, with two of the other.
GROUPS = [*((n, (6, 2)) for n in RANKS), (3, (3, 3)), (4, (3, 3)), (2, (4, 1)), (5, (4, 1))]
LAYOUTS = {
    "contiguous": lambda size: contiguous(23, size),
    "zigzag": lambda size: zigzag(37, size),
    "zigzag, even": lambda size: zigzag(6 * size, size),
    "zigzag, 1 row": lambda size: zigzag(1, size),  # the other ranks have none
    "striped": lambda size: striped(31, size),
    "documents": lambda size: documents([7, 0, 1, 13], size),
    "striped documents": lambda size: documents([1, 6, 0], size, striped),
}

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
all_layouts = pytest.mark.parametrize("name", LAYOUTS)
all_ranks = pytest.mark.parametrize("ranks", RANKS)


def attended_pairs(ring: Ring) -> list[int]:
    """Scores that each rank computes: how even the work is."""
    size = ring.comm.size
    return [sum(tile.pairs for k in range(size) for tile in ring.tiles(q, k)) for q in range(size)]


def solved(task: Problem, strategy: str, kernel: Kernel = reference):
    """Each rank's answers and traffic."""

    def attention_on(comm: Comm):
        return ring_attention(Ring(comm, task.queries, task.keys), kernel, STRATEGIES[strategy])

    return on_threads(task, attention_on)


@strategies
@all_layouts
@pytest.mark.parametrize(("ranks", "heads"), GROUPS, ids=str)
def test_forward_and_backward(strategy, name, ranks, heads):
    task = problem(LAYOUTS[name](ranks), heads=heads)
    answers, _ = solved(task, strategy)
    task.assert_solved(answers, 1e-10)


@strategies
@all_layouts
@pytest.mark.parametrize("ranks", [1, 3])
def test_flash_cpu_in_float32(strategy, name, ranks):
    task = problem(LAYOUTS[name](ranks), dtype=torch.float32)
    answers, _ = solved(task, strategy, flash_cpu)
    task.assert_solved(answers, 2e-6)


def tokens(first: int, count: int, size: int) -> list[Layout]:
    return [single(size, position % size) for position in range(first, first + count)]


CONVERSATIONS = {
    "a second prompt": lambda n: [zigzag(19, n), zigzag(11, n)],
    "a decoded token": lambda n: [zigzag(19, n), *tokens(19, 1, n)],
    "the eighth token": lambda n: [zigzag(19, n), *tokens(19, 8, n)],
    "a prompt behind an answer": lambda n: [zigzag(19, n), *tokens(19, 7, n), striped(13, n)],
    "chunked prefill": lambda n: [contiguous(7, n), zigzag(7, n), zigzag(5, n)],
    "documents go on": lambda n: [documents([7, 0, 5], n), documents([3, 11, 0], n, striped)],
}


@strategies
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_later_turn_over_the_cache(strategy, name, ranks):
    *earlier, last = CONVERSATIONS[name](ranks)
    queries = last.after(grown(earlier))
    task = problem(queries, grown(earlier).then(queries))
    answers, _ = solved(task, strategy)
    task.assert_solved(answers, 1e-10)


# What each rank sends, by operation: arXiv 2411.01783, Table 3 and section 3.5, for rows that need not be even.
# ``kv`` and ``q`` are the rows that ranks hold, ``e`` the bytes of an element, ``acc`` of an accumulated one.


def passing_by(rows: list[int], rank: int) -> list[int]:
    """The blocks that this rank sends on: all but the next rank's own, which arrives there last."""
    return [n for owner, n in enumerate(rows) if owner != (rank + 1) % len(rows)]


def messages(rows: list[int]) -> int:
    return sum(n > 0 for n in rows)


def forward_traffic(strategy, rank, q, kv, hq, hk, d, e, acc):
    if strategy == "pass_kv":
        sent = passing_by(kv, rank)
        return {"shift": 2 * sum(sent) * B * hk * d * e}, {"shift": 2 * messages(sent)}
    if strategy == "all_gather_kv":
        away = len(kv) - 1
        return {"all_to_all": away * 2 * kv[rank] * B * hk * d * e}, {"all_to_all": away * (kv[rank] > 0)}
    sent, others = passing_by(q, rank), [n for owner, n in enumerate(q) if owner != rank]
    return (
        {"shift": sum(sent) * B * hq * d * e, "all_to_all": sum(others) * B * hq * (d + 1) * acc},
        {"shift": messages(sent), "all_to_all": messages(others)},
    )


def backward_traffic(rank, kv, hk, d, e, acc):
    """Keys and values again, and one step behind them the sums of every owner's two gradients."""
    sent = passing_by(kv, rank)
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
    _, traffic = solved(problem(queries, keys, (hq, hk), d, dtype), strategy)
    q, kv = ([layout.rows(r) for r in range(ranks)] for layout in (queries, keys))
    for rank, (forward, total) in enumerate(traffic):
        expected = forward_traffic(strategy, rank, q, kv, hq, hk, d, e, acc)
        assert (forward.bytes, forward.messages) == expected
        more_bytes, more_messages = backward_traffic(rank, kv, hk, d, e, acc)
        assert total.bytes == expected[0] | {"shift": expected[0].get("shift", 0) + more_bytes}
        assert total.messages == expected[1] | {"shift": expected[1].get("shift", 0) + more_messages}


@pytest.mark.parametrize(("ranks", "before", "hops"), [(5, 3, 1), (5, 11, 2), (5, 0, 0), (2, 999, 1)])
def test_a_window_ends_the_ring_when_nobody_needs_more(ranks, before, hops):
    """Contiguous blocks of 7 rows: pass-KV sends a block a hop, pass-Q as many, and answers of whom it reached."""
    layout = contiguous(7 * ranks, ranks)
    task, (hq, hk), d = problem(layout), (6, 2), 5
    for name in ("pass_kv", "pass_q"):

        def rank_main(world, rank, strategy=STRATEGIES[name]):
            comm = world.group(rank)
            ring = Ring(comm, layout, layout, Mask(before))
            return strategy(*task.of(rank)[:3], ring, reference), comm.traffic

        rows = oracle.pack_rows(layout.lengths)
        right, _ = oracle.attention(task.q, task.k, task.v, oracle.visible(rows, rows, before))
        seen, traffic = zip(*run_threads(ranks, rank_main), strict=True)
        oracle.assert_close(layout.unshard([part.out for part in seen], 1), right, 1e-10)
        for rank, sent in enumerate(traffic):
            # Keys reach those behind them: the queries that this rank answers are of the ranks ahead.
            answered = min(hops, ranks - 1 - rank)
            block = 7 * B * 8 * d
            around = hops * block * (2 * hk if name == "pass_kv" else hq)
            home = answered * 7 * B * 8 * hq * (d + 1) if name == "pass_q" else 0
            if name == "pass_q":  # queries go round to the ranks ahead of them, the long way
                around = (ranks - 1) * block * hq if hops else 0
            assert sent.total == around + home


@strategies
def test_a_ring_of_one_sends_nothing(strategy):
    _, [[_, total]] = solved(problem(zigzag(7, 1)), strategy)
    assert (total.bytes, total.messages, total.total) == ({}, {}, 0)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("heads", [(6, 6), (6, 1)], ids=str)
def test_answers_that_meet_are_exact_and_send_a_row_per_head(ulysses, ring, heads):
    """`gather_merge`: rows that all ranks hold, over keys that the ring shares and heads that Ulysses does."""
    keys, queries = documents([19, 11], ring), documents([2, 1], 1).after(documents([17, 10], 1))
    task, size = problem(queries, keys, heads=heads), ulysses * ring

    def rank_main(world, rank):
        comm, at, member = world.group(rank), rank // ulysses, rank % ulysses
        q = share_of_heads(task.q, ulysses, member)
        k, v = (share_of_heads(keys.shard(x, at, 1), ulysses, member) for x in (task.k, task.v))
        seen = empty_partial(q)
        attend_tiles(seen, q, k, v, visible_tiles(queries.ranks[0], keys.ranks[at]), reference)
        return gather_merge(seen, comm, ulysses), comm.traffic.total

    for out, sent in run_threads(size, rank_main):
        oracle.assert_close(out, task.exact()[0], 1e-10)
        assert sent == (size - 1) * B * 3 * (6 // ulysses) * (5 + 1) * 8


@strategies
@pytest.mark.parametrize("heads", [(8, 8), (6, 2), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_three_turns_of_a_ragged_batch(strategy, heads, ranks):
    """The grid of the claim: N, GQA ratios 1, 3, 4 and 8, sequences of different T and P, dealt turn by turn."""
    turns, held = [[29, 1, 13], [5, 17, 0], [2, 0, 23]], [0] * ranks
    cache = None
    for lengths in turns:
        dealt = shard_balanced(lengths, zigzag, held)
        queries = dealt.after(cache) if cache else dealt
        cache = cache.then(queries) if cache else queries
        held = [cache.rows(rank) for rank in range(ranks)]
        task = problem(queries, cache, heads=heads)
        answers, _ = solved(task, strategy)
        task.assert_solved(answers, 1e-10)
        assert max(held) - min(held) <= 29 // (2 * ranks) + 1


@all_ranks
def test_rotate_yields_every_owner_once_its_own_first(ranks):
    layout = contiguous(3 * ranks - 1, ranks)

    def rank_main(world, rank):
        mine = torch.full((1, layout.rows(rank)), rank)
        return [(owner, x.tolist()) for owner, (x,) in rotate(world.group(rank), layout, mine)]

    for rank, turns in enumerate(run_threads(ranks, rank_main)):
        owners = [(rank - step) % ranks for step in range(ranks)]
        assert turns == [(owner, [[owner] * layout.rows(owner)]) for owner in owners]


class Preallocating(ThreadComm):
    """Its receives have their memory from the start, as torch.distributed's do, and those alive are counted."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        super().__init__(world, rank, tuple(range(world.size)))
        self.blocks: list[list[weakref.ref]] = []
        self.most = 0

    def shift(self, *mine, coming) -> Pending:
        arriving = tuple(x.new_empty(shape) for x, shape in zip(mine, coming, strict=True))
        self.blocks.append([weakref.ref(x) for x in arriving])
        self.most = max(self.most, self.alive)
        return _Posted(super().shift(*mine, coming=coming), arriving, mine)

    @property
    def alive(self) -> int:
        return sum(any(ref() is not None for ref in block) for block in self.blocks)


class _Posted:
    def __init__(self, pending: Pending, arriving, leaving) -> None:
        self.pending, self.arriving = pending, arriving
        self.leaving = leaving  # as `DistComm`, whose backend reads them until they have left

    def wait(self):
        for here, sent in zip(self.arriving, self.pending.wait(), strict=True):
            here.copy_(sent)
        return self.arriving


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_two_buffers_whatever_the_number_of_ranks(strategy, ranks):
    """While a block is worked on: that one, and the next, which must already be on its way (overlap)."""
    task = problem(zigzag(8 * ranks, ranks))

    def rank_main(world, rank):
        comm, alive = Preallocating(world, rank), []

        def forward(q, k, v, causal):
            alive.append(comm.alive)
            return reference.forward(q, k, v, causal)

        ring = Ring(comm, task.queries, task.keys)
        with torch.no_grad():
            STRATEGIES[strategy](*task.of(rank)[:3], ring, Kernel("counting", forward, reference.backward))
        return alive, comm.most

    for alive, most in run_threads(ranks, rank_main):  # one tile a step; its own block is nobody's copy
        assert alive == [1] + [2] * (ranks - 2) + [1]
        assert most == min(2, ranks - 1), "a third lived when the next receive was posted"


def test_four_buffers_in_the_backward():
    """Two for keys and values, and two for the sums of their gradients."""
    task = problem(zigzag(40, 5))

    def rank_main(world, rank):
        comm = Preallocating(world, rank)
        ring = Ring(comm, task.queries, task.keys)
        solve(ring_attention(ring, reference, STRATEGIES["pass_kv"]), task, rank, lambda: comm.traffic)
        return comm.most

    assert max(run_threads(5, rank_main)) <= 4


@all_layouts
@all_ranks
def test_attended_pairs_are_the_masks(name, ranks):
    layout = LAYOUTS[name](ranks)
    rows = oracle.pack_rows(layout.lengths)
    mask = oracle.visible(rows, rows)
    ring = Ring(ThreadWorld(ranks).group(0), layout, layout)
    assert list(attended_pairs(ring)) == [int(mask[layout.index(rank)].sum()) for rank in range(ranks)]
