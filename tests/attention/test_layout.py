"""Layouts: every position is held once, and the tensors that are cut by them come back whole."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.layout import Layout, Span, contiguous, documents, empty, single, striped, zigzag
from tests import oracle
from tests.turns import WITHIN, conversations, few, grown, lengths, names, sizes


def all_rows(layout: Layout) -> list[list[int]]:
    return [layout.index(rank).tolist() for rank in range(layout.size)]


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        (contiguous(8, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (zigzag(8, 2), [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (striped(8, 3), [[0, 3, 6], [1, 4, 7], [2, 5]]),
        (zigzag(3, 1), [[0, 1, 2]]),
        (contiguous(2, 3), [[], [0], [1]]),
        (striped(2, 3), [[0], [1], []]),
        (documents([4, 0, 3], 2, contiguous), [[0, 1, 0], [2, 3, 1, 2]]),
        (empty(2), [[], []]),
        (single(3, 1), [[], [0], []]),
    ],
)
def test_who_holds_which_positions(layout, positions):
    assert [layout.positions(rank).tolist() for rank in range(layout.size)] == positions


@few
@given(conversations())
def test_every_row_is_held_once_and_knows_its_position(conversation):
    turns = conversation.layouts()
    for layout in (turns[0], grown(turns), turns[-1].after(grown(turns))):
        assert sorted(chain(*all_rows(layout))) == list(range(layout.total))
        truth = oracle.packed(layout.lengths, layout.begins)
        for rank in range(layout.size):
            index = layout.index(rank)
            assert layout.rows(rank) == len(index)
            assert torch.equal(layout.positions(rank), truth.positions[index])


@few
@given(conversations())
def test_shards_of_a_tensor_come_back_whole(conversation):
    layout = grown(conversation.layouts())
    for dim in (0, 1):
        x = torch.arange(layout.total * 3).view(-1, 3).movedim(0, dim)
        parts = [layout.shard(x, rank, dim) for rank in range(layout.size)]
        assert [part.shape[dim] for part in parts] == [layout.rows(rank) for rank in range(layout.size)]
        assert torch.equal(layout.unshard(parts, dim), x)


@few
@given(sizes, lengths)
def test_ranks_hold_about_as_many_rows(size, length):
    """Contiguous and striped differ by one row at most, zigzag's two chunks by one each: zigzag(4, 5) does."""
    for within, most in ((contiguous, 1), (striped, 1), (zigzag, 2)):
        rows = [within(length, size).rows(rank) for rank in range(size)]
        assert max(rows) - min(rows) <= most


@few
@given(conversations(), st.integers(1, 4))
def test_split_and_gathered_keep_the_rows_and_their_order(conversation, parts):
    layout = grown(conversation.layouts())
    split = layout.split(parts)
    assert split.size == layout.size * parts
    for rank in range(layout.size):
        members = range(rank * parts, (rank + 1) * parts)
        assert torch.equal(torch.cat([split.index(member) for member in members]), layout.index(rank))
        rows = [split.rows(member) for member in members]
        assert max(rows) - min(rows) <= 1
    assert all_rows(split.gathered(parts)) == all_rows(layout)


@few
@given(conversations(size=st.sampled_from([2, 4, 6])))
def test_gathered_neighbours_hold_each_ones_rows_in_turn(conversation):
    """Also where no `split` came before: zigzag over all ranks, gathered for Ulysses."""
    layout = grown(conversation.layouts())
    rows = all_rows(layout)
    assert all_rows(layout.gathered(2)) == [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]


@few
@given(conversations())
def test_a_grown_layout_holds_each_turns_rows_behind_the_earlier_ones(conversation):
    cache, *turns = conversation.layouts()
    for turn in turns:
        later = turn.after(cache)
        assert later.begins == cache.ends
        both = cache.then(later)
        assert both.ends == later.ends
        for rank in range(cache.size):
            rows = [rows for layout in (cache, later) for rows in _named(layout, rank)]
            assert list(_named(both, rank)) == rows
        cache = both


def _named(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """(document, position) of each row."""
    rows = oracle.packed(layout.lengths, layout.begins)[layout.index(rank)]
    return list(zip(rows.documents.tolist(), rows.positions.tolist(), strict=True))


@few
@given(sizes, lengths, names)
def test_nothing_yet_then_a_turn_is_that_turn(size, length, name):
    turn = WITHIN[name](length, size)
    assert all_rows(empty(size).then(turn.after(empty(size)))) == all_rows(turn)


@few
@given(sizes, lengths, names)
def test_decoded_tokens_stay_few_spans(size, length, name):
    """Dealt in turn they are one span of step ``size``: beside the prompt's two, and one token that touches them.

    Otherwise every decoded token would meet every other in a tile of its own.
    """
    cache = WITHIN[name](length, size)
    for position in range(length, length + 6 * size):
        cache = cache.then(single(size, position % size).after(cache))
    assert sorted(chain(*all_rows(cache))) == list(range(length + 6 * size))
    assert max(len(spans) for spans in cache.ranks) <= 4


def test_spans_that_follow_each_other_are_one():
    first, *later = [zigzag(6, 1), contiguous(5, 1), single(1, 0)]
    assert grown([first, *later]).ranks == ((Span(0, 12),),)


def test_a_row_that_is_lost_or_held_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="5 rows are held, the documents have 6"):
        Layout((6,), ((Span(0, 3),), (Span(3, 2),)))


def test_only_the_next_turn_can_follow():
    first, second = zigzag(7, 2), zigzag(5, 2)
    with pytest.raises(AssertionError, match="not the next turn"):
        first.then(second)
    with pytest.raises(AssertionError, match="not the next turn"):
        first.then(zigzag(5, 3).after(first))


def test_a_span_counts_in_its_step():
    span = Span(start=4, length=5, step=3)
    assert span.last == 16
    assert span.part(1, 3) == Span(7, 2, 3)
    assert all(b.start - a.last == 3 for a, b in pairwise([span.part(0, 2), span.part(2, 5)]))
