"""Layouts: exactly one rank holds each position, and `unshard` restores what `shard` cut."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.layout import Layout, contiguous, documents, empty, single, striped, zigzag
from longctx.attention.spans import Span
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
def test_positions_of_each_rank(layout, positions):
    assert [layout.positions(rank).tolist() for rank in range(layout.size)] == positions


@few
@given(conversations())
def test_one_rank_holds_each_row_and_positions_match(conversation):
    turns = conversation.layouts()
    for layout in (turns[0], grown(turns), turns[-1].after(grown(turns))):
        assert sorted(chain(*all_rows(layout))) == list(range(layout.total))
        expected = oracle.pack_rows(layout.lengths, layout.begins)
        for rank in range(layout.size):
            index = layout.index(rank)
            assert layout.rows(rank) == len(index)
            assert torch.equal(layout.positions(rank), expected.positions[index])


@few
@given(conversations())
def test_unshard_inverts_shard(conversation):
    layout = grown(conversation.layouts())
    for dim in (0, 1):
        x = torch.arange(layout.total * 3).view(-1, 3).movedim(0, dim)
        parts = [layout.shard(x, rank, dim) for rank in range(layout.size)]
        assert [part.shape[dim] for part in parts] == [layout.rows(rank) for rank in range(layout.size)]
        assert torch.equal(layout.unshard(parts, dim), x)


@few
@given(sizes, lengths)
def test_row_counts_of_ranks_are_even(size, length):
    """They differ by one row at most, in zigzag by two (one for each chunk of a rank), as in zigzag(4, 5)."""
    for within, max_difference in ((contiguous, 1), (striped, 1), (zigzag, 2)):
        rows = [within(length, size).rows(rank) for rank in range(size)]
        assert max(rows) - min(rows) <= max_difference


@few
@given(conversations(), st.integers(1, 4))
def test_split_and_gather_keep_the_order_of_rows(conversation, parts):
    layout = grown(conversation.layouts())
    split = layout.split(parts)
    assert split.size == layout.size * parts
    for rank in range(layout.size):
        members = range(rank * parts, (rank + 1) * parts)
        assert torch.equal(torch.cat([split.index(member) for member in members]), layout.index(rank))
        rows = [split.rows(member) for member in members]
        assert max(rows) - min(rows) <= 1
    assert all_rows(split.gather(parts)) == all_rows(layout)


@few
@given(conversations(size=st.sampled_from([2, 4, 6])))
def test_gather_concatenates_rows_of_consecutive_ranks(conversation):
    """Also without an earlier `split`: zigzag over all ranks, gathered for Ulysses."""
    layout = grown(conversation.layouts())
    rows = all_rows(layout)
    assert all_rows(layout.gather(2)) == [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]


@few
@given(conversations())
def test_then_appends_rows_of_later_turns(conversation):
    cache, *turns = conversation.layouts()
    for turn in turns:
        later = turn.after(cache)
        assert later.begins == cache.ends
        both = cache.then(later)
        assert both.ends == later.ends
        for rank in range(cache.size):
            rows = [row for layout in (cache, later) for row in _document_positions(layout, rank)]
            assert _document_positions(both, rank) == rows
        cache = both


def _document_positions(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """Return (document, position) of each row."""
    rows = oracle.pack_rows(layout.lengths, layout.begins)[layout.index(rank)]
    return list(zip(rows.documents.tolist(), rows.positions.tolist(), strict=True))


@few
@given(sizes, lengths, names)
def test_empty_layout_then_a_turn_equals_the_turn(size, length, name):
    turn = WITHIN[name](length, size)
    assert all_rows(empty(size).then(turn.after(empty(size)))) == all_rows(turn)


@few
@given(sizes, lengths, names)
def test_decoded_tokens_stay_few_spans(size, length, name):
    """Round-robin tokens are one span of step ``size``, next to the prompt's two and one token that touches them.

    Separate spans would give a tile for each pair of decoded tokens.
    """
    cache = WITHIN[name](length, size)
    for position in range(length, length + 6 * size):
        cache = cache.then(single(size, position % size).after(cache))
    assert sorted(chain(*all_rows(cache))) == list(range(length + 6 * size))
    assert max(len(spans) for spans in cache.ranks) <= 4


def test_consecutive_spans_are_merged():
    first, *later = [zigzag(6, 1), contiguous(5, 1), single(1, 0)]
    assert grown([first, *later]).ranks == ((Span(0, 12),),)


def test_lost_row_fails_an_assertion():
    with pytest.raises(AssertionError, match="the ranks hold 5 rows, but the documents have 6"):
        Layout((6,), ((Span(0, 3),), (Span(3, 2),)))


def test_then_refuses_layouts_that_do_not_continue():
    first, second = zigzag(7, 2), zigzag(5, 2)
    with pytest.raises(AssertionError, match="not the next turn"):
        first.then(second)
    with pytest.raises(AssertionError, match="over 3 ranks cannot extend one over 2"):
        first.then(zigzag(5, 3).after(first))


def test_span_last_and_part_use_the_step():
    span = Span(start=4, length=5, step=3)
    assert span.last == 16
    assert span.part(1, 3) == Span(7, 2, 3)
    assert all(b.start - a.last == 3 for a, b in pairwise([span.part(0, 2), span.part(2, 5)]))


@few
@given(conversations())
def test_documents_alone_have_the_rows_and_positions_of_the_layout(conversation):
    layout = grown(conversation.layouts())
    alone = layout.by_document()
    assert [(one.lengths, one.begins) for one in alone] == [
        ((n,), (begin,)) for n, begin in zip(layout.lengths, layout.begins, strict=True)
    ]
    for rank in range(layout.size):
        rows = layout.rows_by_document(rank)
        assert sorted(chain(*(each.tolist() for each in rows))) == list(range(layout.rows(rank)))
        for one, each in zip(alone, rows, strict=True):
            assert torch.equal(one.positions(rank), layout.positions(rank)[each])
