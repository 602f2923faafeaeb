"""Rows and blocks under a window equal those of the ring, on a zigzag layout whose chunks are even."""

import pytest

from longctx.attention.layout import Layout, documents
from longctx.attention.mask import causal_within
from longctx.attention.spans import Span
from longctx.attention.tiles import visible_tiles
from longctx.cost.attention import COSTS, Work, backward_cost, pass_kv_cost, pass_q_cost
from longctx.cost.hardware import Hardware, Link
from longctx.cost.window import Reach, most_keys, reach_of
from longctx.parallel.ring import Ring
from longctx.parallel.rows import count_rows
from longctx.parallel.threads import ThreadWorld

CHUNKS = [((3,), (0,)), ((3,), (5,)), ((4, 7), (2, 0)), ((1,), (13,))]  # rows of a chunk of new and of cached tokens


def layouts(new: tuple[int, ...], cached: tuple[int, ...], ranks: int) -> tuple[Layout, Layout]:
    """Return the layouts of queries and keys: a turn of ``new`` tokens after one of ``cached`` tokens, both zigzag."""
    queries = documents(new, ranks)
    if not any(cached):
        return queries, queries
    cache = documents(cached, ranks)
    return queries.after(cache), cache.then(queries.after(cache))


def reach_on_ring(queries: Layout, keys: Layout, ranks: int, window: int) -> Reach:
    ring, hops = Ring(ThreadWorld(ranks).group(0), queries, keys, causal_within(window)), range(1, ranks)

    def mean(rows_of_rank) -> float:
        return sum(count_rows(rows_of_rank(rank), 0) for rank in range(ranks)) / ranks

    tiles = [(q, k, ring.tiles(q, k)) for q in range(ranks) for k in range(ranks)]
    read = [{row for tile in some for row in range(tile.k0, tile.k1)} for _, _, some in tiles]
    return Reach(
        tuple(mean(lambda rank, hop=hop: ring.keys_on_hop(rank, hop)) for hop in hops),
        tuple(mean(lambda rank, hop=hop: ring.queries_to_send(rank, hop, ranks - hop)) for hop in hops),
        tuple(mean(lambda rank, hop=hop: ring.sums_on_hop(rank, hop)) for hop in range(1, ranks + 1)),
        sum(mean(lambda rank, hop=hop: ring.keys_to_send(rank, hop)) for hop in hops),
        sum(mean(lambda rank, hop=hop: ring.queries_to_send(rank, hop)) for hop in hops),
        sum(map(len, read)) / ranks,
        sum(bool(some) for _, _, some in tiles) / ranks,
    )


@pytest.mark.parametrize(("new", "cached"), CHUNKS, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 6, 11, 997])
def test_reach_equals_that_of_the_ring(new, cached, ranks, window):
    new, cached = (tuple(2 * ranks * rows for rows in each) for each in (new, cached))
    computed, expected = (
        reach_of(new, cached, ranks, window),
        reach_on_ring(*layouts(new, cached, ranks), ranks, window),
    )
    for name, value in vars(expected).items():
        assert getattr(computed, name) == pytest.approx(value), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 6, 11, 37, 61, None])
def test_most_keys_of_a_decoded_token_are_those_of_the_ring(ranks, window):
    keys = documents((total := 6 * 2 * ranks,), ranks)
    query = (Span(total - 1, 1),)
    tiles = [visible_tiles(query, spans, causal_within(window)) for spans in keys.ranks]
    assert most_keys(total, ranks, window) == max(sum(tile.pairs for tile in some) for some in tiles)


HARDWARE = Hardware(1e12, 1e11, 1e-5, Link(1e-5, 1e9), Link(1e-5, 1e9), overlap=0.5)


def work(new: int, window: int | None, cached: int = 0) -> Work:
    return Work((new,), (cached,), 8, heads=8, kv_heads=2, head_dim=128, element_bytes=2, window=window)


def test_bytes_of_a_window_do_not_grow_with_the_text():
    for cost in (*COSTS.values(), backward_cost):
        short, long, whole = (cost(work(*each), HARDWARE) for each in ((2**16, 512), (2**18, 512), (2**18, None)))
        assert short.bytes_sent == long.bytes_sent < whole.bytes_sent / 50
        assert long.seconds < whole.seconds


def test_short_turn_after_a_long_text_is_no_longer_charged_for_the_whole_cache():
    """Without a window, 64 tokens after 2^18 go by pass-Q; with one, the keys that travel are few."""
    for window, faster in ((None, "pass_q"), (64, "pass_kv")):
        one = work(64, window, 2**18)
        kv, q = pass_kv_cost(one, HARDWARE).seconds, pass_q_cost(one, HARDWARE).seconds
        assert ("pass_kv" if kv <= q else "pass_q") == faster
