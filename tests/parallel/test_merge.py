"""Partials of the same rows, merged over ranks on threads: exact, with the bytes of one row for each head."""

import pytest
import torch

from longctx.attention.kernel import attend_tiles, reference
from longctx.attention.layout import documents
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.parallel.merge import gather_merge, scatter_merge
from longctx.parallel.threads import run_threads
from longctx.parallel.ulysses import share_of_heads
from tests import oracle
from tests.parallel.problem import B, problem


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("heads", [(6, 6), (6, 1)], ids=str)
def test_gather_merge_is_exact_and_sends_one_row_per_head(ulysses, ring, heads):
    """Query rows that all ranks hold, over keys sharded by the ring and heads sharded by Ulysses."""
    keys, queries = documents([19, 11], ring), documents([2, 1], 1).after(documents([17, 10], 1))
    task, size = problem(queries, keys, heads=heads), ulysses * ring

    def rank_main(world, rank):
        comm, ring_rank, member = world.group(rank), rank // ulysses, rank % ulysses
        q = share_of_heads(task.q, ulysses, member)
        k, v = (share_of_heads(keys.shard(x, ring_rank, 1), ulysses, member) for x in (task.k, task.v))
        partial = empty_partial(q)
        attend_tiles(partial, q, k, v, visible_tiles(queries.ranks[0], keys.ranks[ring_rank]), reference)
        return gather_merge(partial, comm, ulysses), comm.traffic.total

    for out, sent in run_threads(size, rank_main):
        oracle.assert_close(out, task.exact()[0], 1e-10)
        assert sent == (size - 1) * B * 3 * (6 // ulysses) * (5 + 1) * 8


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (1, 3), (3, 1), (2, 2), (1, 7)])
@pytest.mark.parametrize("heads", [(6, 6), (6, 1)], ids=str)
def test_scatter_merge_gives_each_rank_its_heads(ulysses, ring, heads):
    """Shares of heads are uneven for 4 ranks, and rank 0 of 7 has none.  Cases with and without attention sinks."""
    keys, queries = documents([19, 11], ring), documents([2, 1], 1).after(documents([17, 10], 1))
    task, size = problem(queries, keys, heads=heads), ulysses * ring
    shares = [range(6 * rank // size, 6 * (rank + 1) // size) for rank in range(size)]
    sinks = torch.randn(6, dtype=torch.float64)

    def rank_main(world, rank):
        comm, ring_rank, member = world.group(rank), rank // ulysses, rank % ulysses
        q = share_of_heads(task.q, ulysses, member)
        k, v = (share_of_heads(keys.shard(x, ring_rank, 1), ulysses, member) for x in (task.k, task.v))
        partial = empty_partial(q)
        attend_tiles(partial, q, k, v, visible_tiles(queries.ranks[0], keys.ranks[ring_rank]), reference)
        out = scatter_merge(partial, comm, ulysses, shares)
        return out, comm.traffic.total, scatter_merge(partial, comm, ulysses, shares, sinks)

    results = run_threads(size, rank_main)
    visible = oracle.visible(oracle.pack_rows([2, 1], [17, 10]), oracle.pack_rows([19, 11]))
    exact, lse = oracle.attention(task.q, task.k, task.v, visible)
    oracle.assert_close(torch.cat([out for out, *_ in results], 2), exact, 1e-10)
    for rank, (_, sent, _) in enumerate(results):
        attended = 6 // ulysses
        first = attended * (rank % ulysses)
        own = len([head for head in shares[rank] if first <= head < first + attended])
        assert sent == B * 3 * (attended - own) * (5 + 1) * 8
    # A sink takes the share 1 / (1 + exp(lse - sink)) of a head's weight.
    weight = torch.sigmoid(lse - sinks).unsqueeze(-1)
    oracle.assert_close(torch.cat([with_sinks for *_, with_sinks in results], 2), exact * weight, 1e-10)
