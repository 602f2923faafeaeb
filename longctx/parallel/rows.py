"""Ranges of rows in a block of keys or queries, for example the rows that travel under a window."""

from collections.abc import Iterable

import torch

from longctx.attention.spans import Spans, slice_rows
from longctx.shapes import Tensor

Rows = tuple[tuple[int, int], ...]  # rows of a block: ranges (first, end), sorted, with gaps between them


def union_of(ranges: Iterable[tuple[int, int]]) -> Rows:
    """Return the union of ``ranges`` of rows (first, end), which may overlap, as sorted ranges that do not touch."""
    union: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if union and first <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((first, end))
    return tuple(union)


def spans_of(spans: Spans, rows: Rows | None) -> Spans:
    """Return the spans of ``rows`` (None: all rows) of a block that has ``spans``."""
    return spans if rows is None else tuple(s for first, end in rows for s in slice_rows(spans, first, end))


def count_rows(rows: Rows | None, whole: int) -> int:
    """Return the number of ``rows`` (None: all rows) of a block that has ``whole`` rows."""
    return whole if rows is None else sum(end - first for first, end in rows)


def take_rows(x: Tensor, arrived: Rows | None, wanted: Rows | None) -> Tensor:
    """Return the rows ``wanted`` of a block; ``x`` has the block's rows ``arrived``, which include ``wanted``.

    Rows are dim 1.  None means all rows of the block.  The result may be ``x`` itself.
    """
    if arrived == wanted or wanted is None:
        return x
    arrived = ((0, x.shape[1]),) if arrived is None else arrived
    slices, begin = [x[:, :0]], 0
    for first, end in arrived:
        slices += [x[:, begin + a - first : begin + b - first] for a, b in wanted if first <= a < end]
        begin += end - first
    return torch.cat(slices, 1)


def add_rows_(total: Tensor, rows: Rows | None, x: Tensor, added: Rows) -> None:
    """Add ``x``, which has the rows ``added`` of a block, to ``total``, in place.

    Rows are dim 1.  ``total`` has the block's rows ``rows`` (None: all rows), which include ``added``.
    """
    begin = 0
    for first, end in added:
        at = first if rows is None else count_rows(tuple((a, min(b, first)) for a, b in rows if a < first), 0)
        total[:, at : at + end - first] += x[:, begin : begin + end - first]
        begin += end - first
