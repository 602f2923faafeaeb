"""Windows on a ring of threads: only the rows that a rank sees travel, in the forward and in the backward."""

from functools import partial as partial_of

import pytest
import torch

from longctx.attention.kernel import reference
from longctx.attention.layout import Layout, contiguous, documents, striped, zigzag
from longctx.attention.mask import Mask
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadWorld, run_threads
from tests import oracle
from tests.parallel.problem import B, on_threads, problem
from tests.turns import decoded_tokens, grown

strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def seen_rows(mask: torch.Tensor, queries: Layout, keys: Layout, q_ranks: list[int], k_ranks: list[int]):
    """Return the numbers of rows of ``q_ranks`` that see a key of ``k_ranks``, and of the keys that they see."""
    q_rows, k_rows = (
        torch.cat([layout.index(rank) for rank in ranks]) for layout, ranks in ((queries, q_ranks), (keys, k_ranks))
    )
    seen = mask[q_rows][:, k_rows]
    return int(seen.any(1).sum()), int(seen.any(0).sum())


def windowed_bytes(strategy: str, rank: int, ranks: int, rows_seen, hq: int, hk: int, d: int) -> int:
    """Return the bytes of a float64 forward in which each row travels only as far as the last rank that needs it."""
    others = [other for other in range(ranks) if other != rank]
    if strategy == "all_gather_kv":
        return sum(rows_seen([other], [rank])[1] for other in others) * B * 2 * hk * d * 8
    rows = 0
    for hop in range(1, ranks):
        owner = (rank - hop + 1) % ranks
        later = [(owner + n) % ranks for n in range(hop, ranks)]
        rows += rows_seen(later, [owner])[1] if strategy == "pass_kv" else rows_seen([owner], later)[0]
    if strategy == "pass_kv":
        return rows * B * 2 * hk * d * 8
    returned = sum(rows_seen([other], [rank])[0] for other in others)
    return rows * B * hq * d * 8 + returned * B * hq * (d + 1) * 8


WINDOWED = {
    "contiguous": lambda n: (contiguous(7 * n, n),),
    "zigzag": lambda n: (zigzag(37, n),),
    "striped": lambda n: (striped(31, n),),
    "a prompt after an answer": lambda n: (zigzag(19, n), *decoded_tokens(19, 7, n), zigzag(23, n)),
    "a decoded token": lambda n: (zigzag(19, n), *decoded_tokens(19, 1, n)),
    "documents continue": lambda n: (documents([7, 0, 5], n), documents([3, 11, 0], n, striped)),
}


windows = pytest.mark.parametrize(("ranks", "before"), [(2, 3), (5, 2), (5, 11), (3, 0), (2, 999)])


def windowed(name: str, ranks: int, before: int) -> tuple[Layout, Layout, torch.Tensor]:
    """Return the layouts of queries and keys, and the dense mask of a window."""
    *earlier, queries = WINDOWED[name](ranks)
    queries = queries.after(grown(earlier)) if earlier else queries
    keys = grown(earlier).then(queries) if earlier else queries
    rows = oracle.pack_rows(queries.lengths, queries.begins), oracle.pack_rows(keys.lengths)
    return queries, keys, oracle.visible(*rows, before)


@strategies
@pytest.mark.parametrize("name", WINDOWED)
@windows
def test_window_sends_only_the_rows_that_are_seen(strategy, name, ranks, before):
    queries, keys, mask = windowed(name, ranks, before)
    task, (hq, hk), d = problem(queries, keys), (6, 2), 5

    def rank_main(world, rank):
        comm = world.group(rank)
        ring = Ring(comm, queries, keys, Mask(before))
        return STRATEGIES[strategy](*task.of(rank)[:3], ring, reference), comm.traffic.total

    exact, _ = oracle.attention(task.q, task.k, task.v, mask)
    with torch.no_grad():
        partials, sent = zip(*run_threads(ranks, rank_main), strict=True)
    oracle.assert_close(queries.unshard([partial.out for partial in partials], 1), exact, 1e-10)
    for rank in range(ranks):
        rows_seen = partial_of(seen_rows, mask, queries, keys)
        assert sent[rank] == windowed_bytes(strategy, rank, ranks, rows_seen, hq, hk, d)


def test_window_at_a_border_of_two_blocks_sends_one_window():
    """Two ranks in zigzag order have chunks of 25 rows; each sends the 6 rows before the other rank's next chunk."""
    layout = zigzag(100, 2)
    for rank, owner in ((0, 1), (1, 0)):
        ring = Ring(ThreadWorld(2).group(rank), layout, layout, Mask(6))
        assert ring.keys_to_send(owner, 1) == (((19, 25),) if owner == 0 else ((44, 50),))


def backward_bytes(rank: int, ranks: int, rows_seen, hk: int, d: int) -> int:
    """Return the bytes of a float64 backward: keys and values as in pass-KV, and the sums of two gradients.

    A sum leaves the rank ``hop`` hops after its owner with the rows that the ranks after the owner, up to this one,
    have seen.
    """
    rows = 0
    for hop in range(1, ranks):
        owner = (rank - hop) % ranks
        rows += rows_seen([(owner + n) % ranks for n in range(1, hop + 1)], [owner])[1]
    return windowed_bytes("pass_kv", rank, ranks, rows_seen, 0, hk, d) + rows * B * 2 * hk * d * 8


@pytest.mark.parametrize("name", WINDOWED)
@windows
def test_backward_under_a_window_sends_only_the_rows_that_are_seen(name, ranks, before):
    queries, keys, mask = windowed(name, ranks, before)
    task = problem(queries, keys)
    results, traffic = on_threads(
        task, lambda comm: ring_attention(Ring(comm, queries, keys, Mask(before)), reference, STRATEGIES["pass_kv"])
    )
    out, _ = oracle.attention(task.q, task.k, task.v, mask)
    exact = out, *oracle.gradients(task.q, task.k, task.v, mask, task.dout)
    for layout, parts, right in zip((queries, queries, keys, keys), zip(*results, strict=True), exact, strict=True):
        oracle.assert_close(layout.unshard(parts, 1), right, 1e-10)
    rows_seen = partial_of(seen_rows, mask, queries, keys)
    for rank, (forward, total) in enumerate(traffic):
        assert total.total - forward.total == backward_bytes(rank, ranks, rows_seen, hk=2, d=5)


def test_backward_sends_a_few_windows_for_any_length():
    """Five ranks in zigzag order, with blocks of 40 and of 80 rows, and a window of 6 earlier keys."""
    sent = []
    for length in (200, 400):
        task = problem(zigzag(length, 5))
        _, traffic = on_threads(
            task,
            lambda comm, layout=task.keys: ring_attention(
                Ring(comm, layout, layout, Mask(6)), reference, STRATEGIES["pass_kv"]
            ),
        )
        sent.append([total.total - forward.total for forward, total in traffic])
    # At 4 borders of chunks the next chunk's rank is 1 hop away, at 4 borders it is 4 hops away.  There 6 rows of keys
    # and values travel; their gradients travel the rest of the ring: 4 hops, and 1 hop.
    rows = 6 * (4 * 1 + 4 * 4) // 5
    assert sent == [[2 * rows * B * 2 * 2 * 5 * 8] * 5] * 2
