"""Tiles cover exactly the pairs that the mask allows, each once, in shapes on which all kernels agree."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.layout import Layout, contiguous, documents, single, striped, zigzag
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.spans import Span
from longctx.attention.tiles import Tile, split_keys, visible_tiles
from tests import oracle
from tests.turns import conversations, few, grown, lengths, sizes


def coverage(tiles: tuple[Tile, ...], sq: int, sk: int) -> torch.Tensor:
    """Return how often each pair is computed, after asserting the shapes that kernels rely on."""
    counts = torch.zeros(sq, sk, dtype=torch.long)
    for tile in tiles:
        rows, columns = tile.q1 - tile.q0, tile.k1 - tile.k0
        assert rows > 0 and columns > 0, f"{tile} is empty"
        inside = min(tile.q0, tile.k0) >= 0 and tile.q1 <= sq and tile.k1 <= sk
        assert inside, f"{tile} exceeds the matrix"
        assert rows == columns or not tile.causal, f"{tile} is not square"
        block = torch.ones(rows, columns, dtype=torch.long)
        assert tile.causal or not tile.mirrored, f"{tile} is mirrored but not causal"
        counts[tile.q, tile.k] += block if not tile.causal else block.triu() if tile.mirrored else block.tril()
    assert sum(tile.pairs for tile in tiles) == counts.sum()
    return counts


masks = st.one_of(st.just(CAUSAL), st.builds(Mask, *[st.one_of(st.none(), st.integers(0, 19))] * 2))


def assert_exact(queries: Layout, keys: Layout, mask: Mask = CAUSAL) -> None:
    """Assert for each pair of ranks that the tiles cover the oracle's mask, which is made from positions alone."""
    q_rows = oracle.pack_rows(queries.lengths, queries.begins)
    k_rows = oracle.pack_rows(keys.lengths, keys.begins)
    for q in range(queries.size):
        for k in range(keys.size):
            mask_of_ranks = oracle.visible(q_rows[queries.index(q)], k_rows[keys.index(k)], mask.before, mask.after)
            tiles = visible_tiles(queries.ranks[q], keys.ranks[k], mask)
            assert torch.equal(coverage(tiles, *mask_of_ranks.shape), mask_of_ranks.long()), f"rank {q} over rank {k}"


@few
@given(conversations(), masks)
def test_tiles_cover_the_mask_of_turns_over_a_cache(conversation, mask):
    """The last turn over the whole cache, and the whole cache over itself."""
    turns = conversation.layouts()
    cache = grown(turns)
    last = turns[-1].after(grown(turns[:-1])) if turns[1:] else cache
    assert_exact(last, cache, mask)
    assert_exact(cache, cache, mask)


@few
@given(conversations(size=st.sampled_from([2, 4])), st.integers(1, 3), masks)
def test_tiles_cover_the_mask_after_gather_and_split(conversation, parts, mask):
    """Gathered rows need not have ascending positions, and a split cuts spans anywhere."""
    layout = grown(conversation.layouts())
    assert_exact(layout.gather(2), layout.gather(2), mask)
    assert_exact(layout.split(parts), layout.split(parts), mask)


def test_fully_visible_spans_of_different_steps_are_one_tile():
    """New rows over an answer that was decoded round-robin are not cut row by row."""
    new, answer = (Span(400, 101, 1),), (Span(305, 31, 3),)
    assert visible_tiles(new, answer, Mask()) == (Tile(0, 101, 0, 31),)
    assert visible_tiles(answer, new, Mask(after=200)) == (Tile(0, 31, 0, 101),)


@pytest.mark.parametrize("before", [1, 2, 7, 31])
def test_window_tiles_compute_no_hidden_pair(before):
    """A band is cut into few tiles, and none of them computes a pair outside the window."""
    (spans,) = contiguous(101, 1).ranks
    tiles = visible_tiles(spans, spans, Mask(before))
    assert sum(tile.pairs for tile in tiles) == sum(min(row, before) + 1 for row in range(101))
    assert len(tiles) <= 3 * (101 // before + 1)


def test_mask_that_hides_own_key_is_refused():
    with pytest.raises(ValueError, match="before=3, after=-1 hides a query's own key; use bounds of 0 or more"):
        Mask(3, -1)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_tiles_cover_the_mask_of_a_conversation(size):
    """A prompt, an answer of decoded tokens, the next prompt; and packed documents over several turns."""
    prompt, answer = zigzag(29, size), [single(size, i % size) for i in range(29, 29 + 3 * size + 1)]
    for later in ([prompt, *answer, zigzag(17, size)], [prompt, striped(13, size), zigzag(7, size)]):
        assert_exact(later[-1].after(grown(later[:-1])), grown(later))
        assert_exact(grown(later), grown(later))
    packed = [documents(lengths, size) for lengths in ([11, 0, 1], [2, 7, 0], [0, 1, 13])]
    assert_exact(packed[-1].after(grown(packed[:-1])), grown(packed))


@few
@given(conversations())
def test_causal_queries_have_no_tiles_over_later_keys(conversation):
    """No kernel call of a causal turn is masked as a whole."""
    turns = conversation.layouts()
    cache = grown(turns)
    later = turns[-1].after(cache)
    for q in cache.ranks:
        assert all(visible_tiles(q, k) == () for k in later.ranks)


@few
@given(sizes, lengths)
def test_zigzag_has_one_tile_per_pair_of_ranks(size, length):
    """A triangle over a rank's own keys, a rectangle over others'; unmerged, its two chunks give two or three tiles."""
    layout = zigzag(length, size)
    for q in range(size):
        for k in range(size):
            tiles = visible_tiles(layout.ranks[q], layout.ranks[k])
            if q == k:
                rows = layout.rows(q)
                assert tiles == ((Tile(0, rows, 0, rows, causal=True),) if rows else ())
            else:
                assert len(tiles) <= 1
                assert not any(tile.causal for tile in tiles)
                assert length < 2 * size or len(tiles) == 1


@few
@given(sizes, lengths)
def test_striped_has_a_triangle_and_at_most_one_single_row_tile(size, length):
    """Interleaved spans of the same step are not cut row by row."""
    layout = striped(length, size)
    for q in range(size):
        for k in range(size):
            tiles = visible_tiles(layout.ranks[q], layout.ranks[k])
            assert sum(tile.causal for tile in tiles) <= 1
            assert all(1 in (tile.q1 - tile.q0, tile.k1 - tile.k0) for tile in tiles if not tile.causal)
            assert len(tiles) <= 2


def test_time_is_linear_in_documents():
    """Eight times as many documents take about eight times as long, not 64 times."""

    def seconds(count: int) -> float:
        layout, times = documents([13] * count, 2), []
        for _ in range(3):
            begin = time.process_time()
            visible_tiles(layout.ranks[1], layout.ranks[0])
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(1024) < 25 * seconds(128)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_zigzag_work_is_even(size, chunk):
    """All ranks compute equally many pairs if 2 * size divides the length (arXiv 2411.01783, 3.5.1)."""
    length = 2 * size * chunk
    layout = zigzag(length, size)
    pairs = [
        sum(tile.pairs for k in range(size) for tile in visible_tiles(layout.ranks[q], layout.ranks[k]))
        for q in range(size)
    ]
    assert set(pairs) == {length * (length + 1) // 2 // size}


def test_tiles_of_parts_of_the_keys_count_from_their_beginnings():
    parts = split_keys([Tile(0, 2, 0, 3), Tile(2, 4, 3, 4), Tile(4, 5, 4, 9), Tile(4, 6, 9, 11, True)], [3, 1, 0, 7, 0])
    assert parts == [[Tile(0, 2, 0, 3)], [Tile(2, 4, 0, 1)], [], [Tile(4, 5, 0, 5), Tile(4, 6, 5, 7, True)], []]
    with pytest.raises(AssertionError, match="spans two parts"):
        split_keys([Tile(0, 1, 2, 4)], [3, 3])
