"""Tiles cover exactly what the mask allows, each pair once, in shapes that all kernels agree on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.layout import Layout, Span, contiguous, documents, single, striped, zigzag
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.tiles import Tile, visible_tiles
from tests import oracle
from tests.turns import conversations, few, grown, lengths, sizes


def coverage(tiles: tuple[Tile, ...], sq: int, sk: int) -> torch.Tensor:
    """How often each pair is computed; asserts the shapes that kernels rely on."""
    counts = torch.zeros(sq, sk, dtype=torch.long)
    for tile in tiles:
        rows, columns = tile.q1 - tile.q0, tile.k1 - tile.k0
        assert rows > 0 and columns > 0, f"{tile} is empty"
        inside = min(tile.q0, tile.k0) >= 0 and tile.q1 <= sq and tile.k1 <= sk
        assert inside, f"{tile} reaches out"
        assert rows == columns or not tile.causal, f"{tile} is no square"
        block = torch.ones(rows, columns, dtype=torch.long)
        assert tile.causal or not tile.mirrored, f"{tile} has no two halves"
        counts[tile.q, tile.k] += block if not tile.causal else block.triu() if tile.mirrored else block.tril()
    assert sum(tile.pairs for tile in tiles) == counts.sum()
    return counts


masks = st.one_of(st.just(CAUSAL), st.builds(Mask, *[st.one_of(st.none(), st.integers(0, 19))] * 2))


def assert_exact(queries: Layout, keys: Layout, mask: Mask = CAUSAL) -> None:
    """Of each two ranks the tiles are the mask; rows are looked up by position, not by tile code."""
    q_rows = oracle.packed(queries.lengths, queries.begins)
    k_rows = oracle.packed(keys.lengths, keys.begins)
    for q in range(queries.size):
        for k in range(keys.size):
            seen = oracle.visible(q_rows[queries.index(q)], k_rows[keys.index(k)], mask.before, mask.after)
            tiles = visible_tiles(queries.ranks[q], keys.ranks[k], mask)
            assert torch.equal(coverage(tiles, *seen.shape), seen.long()), f"rank {q} over rank {k}"


@few
@given(conversations(), masks)
def test_tiles_are_the_mask_of_turns_over_the_cache(conversation, mask):
    """The last turn over itself and all that came before; and all over all."""
    turns = conversation.layouts()
    cache = grown(turns)
    last = turns[-1].after(grown(turns[:-1])) if turns[1:] else cache
    assert_exact(last, cache, mask)
    assert_exact(cache, cache, mask)


@few
@given(conversations(size=st.sampled_from([2, 4])), st.integers(1, 3), masks)
def test_tiles_are_the_mask_where_ulysses_gathers(conversation, parts, mask):
    """Members' rows in turn need not ascend, and a split cuts spans anywhere."""
    layout = grown(conversation.layouts())
    assert_exact(layout.gathered(2), layout.gathered(2), mask)
    assert_exact(layout.split(parts), layout.split(parts), mask)


def test_what_lies_behind_is_one_tile_whatever_its_step():
    """New rows over an answer that was decoded round the ring: not row by row."""
    new, answer = (Span(400, 101, 1),), (Span(305, 31, 3),)
    assert visible_tiles(new, answer, Mask()) == (Tile(0, 101, 0, 31),)
    assert visible_tiles(answer, new, Mask(after=200)) == (Tile(0, 31, 0, 101),)


@pytest.mark.parametrize("before", [1, 2, 7, 31])
def test_a_window_costs_what_it_shows(before):
    """A band is cut into few tiles, and none of them computes a pair that the window hides."""
    (spans,) = contiguous(101, 1).ranks
    tiles = visible_tiles(spans, spans, Mask(before))
    assert sum(tile.pairs for tile in tiles) == sum(min(row, before) + 1 for row in range(101))
    assert len(tiles) <= 3 * (101 // before + 1)


def test_a_mask_that_hides_a_querys_own_key_is_refused():
    with pytest.raises(ValueError, match="a mask of 3 before and -1 after"):
        Mask(3, -1)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_tiles_are_the_mask_of_a_conversation(size):
    """A prompt, an answer of decoded tokens, the next prompt, and packed documents that go on."""
    prompt, answer = zigzag(29, size), [single(size, i % size) for i in range(29, 29 + 3 * size + 1)]
    for later in ([prompt, *answer, zigzag(17, size)], [prompt, striped(13, size), zigzag(7, size)]):
        assert_exact(later[-1].after(grown(later[:-1])), grown(later))
        assert_exact(grown(later), grown(later))
    packed = [documents(lengths, size) for lengths in ([11, 0, 1], [2, 7, 0], [0, 1, 13])]
    assert_exact(packed[-1].after(grown(packed[:-1])), grown(packed))


@few
@given(conversations())
def test_the_future_is_never_computed(conversation):
    """Not even as a masked tile: no ring step of a causal turn costs a kernel call for nothing."""
    turns = conversation.layouts()
    cache = grown(turns)
    later = turns[-1].after(cache)
    for q in cache.ranks:
        assert all(visible_tiles(q, k) == () for k in later.ranks)


@few
@given(sizes, lengths)
def test_zigzag_is_a_triangle_at_home_and_a_rectangle_elsewhere(size, length):
    """The two chunks of a rank make two tiles or three in a plain count: fewer, larger kernel calls."""
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
def test_striped_is_a_triangle_and_at_most_one_row_beside_it(size, length):
    """Interleaved rows of one step are not taken row by row."""
    layout = striped(length, size)
    for q in range(size):
        for k in range(size):
            tiles = visible_tiles(layout.ranks[q], layout.ranks[k])
            assert sum(tile.causal for tile in tiles) <= 1
            assert all(1 in (tile.q1 - tile.q0, tile.k1 - tile.k0) for tile in tiles if not tile.causal)
            assert len(tiles) <= 2


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_zigzag_work_is_even(size, chunk):
    """Where 2 * size divides the length, to the last pair (arXiv 2411.01783, 3.5.1)."""
    length = 2 * size * chunk
    layout = zigzag(length, size)
    pairs = [
        sum(tile.pairs for k in range(size) for tile in visible_tiles(layout.ranks[q], layout.ranks[k]))
        for q in range(size)
    ]
    assert set(pairs) == {length * (length + 1) // 2 // size}
