"""Where queries meet keys: two sets of spans in, the rectangles and triangles of the score matrix out.

Every ring step of every layout, and every turn over a cache, is a list of tiles of two shapes only: a full
rectangle, or a square lower triangle.  All attention kernels agree on those two, whichever corner their
causal mask is aligned to, and no row of a tile is ever fully masked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

from longctx.attention.layout import Span, Spans


@dataclass(frozen=True, slots=True)
class Tile:
    """Local rows ``q0:q1`` of the queries see rows ``k0:k1`` of the keys; all, or the lower triangle."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False

    @property
    def q(self) -> slice:
        return slice(self.q0, self.q1)

    @property
    def k(self) -> slice:
        return slice(self.k0, self.k1)

    @property
    def pairs(self) -> int:
        """Scores that this tile computes."""
        rows = self.q1 - self.q0
        return rows * (rows + 1) // 2 if self.causal else rows * (self.k1 - self.k0)

    def moved(self, q: int, k: int) -> "Tile":
        return Tile(self.q0 + q, self.q1 + q, self.k0 + k, self.k1 + k, self.causal)


@lru_cache(maxsize=4096)
def causal_tiles(q: Spans, k: Spans) -> tuple[Tile, ...]:
    """The tiles in which a query at some position sees a key of its document at or before it."""
    tiles: list[Tile] = []
    for q0, q_spans in _runs(q):
        for k0, k_spans in _runs(k):
            if q_spans[0].document != k_spans[0].document:
                continue
            tiles += [tile.moved(q0, k0) for tile in _of_runs(q_spans, k_spans)]
    return tuple(_coalesced(tiles))


def _runs(spans: Spans) -> Iterator[tuple[int, Spans]]:
    """Neighbouring spans of one document, with the row that they begin at."""
    begin = 0
    for _, group in groupby(spans, key=lambda span: span.document):
        run = tuple(group)
        yield begin, run
        begin += sum(span.length for span in run)


def _of_runs(q: Spans, k: Spans) -> list[Tile]:
    ascending = all(a.last < b.start for a, b in pairwise(q))
    if q == k and ascending:
        # The same rows in order: row i sees rows 0..i, however far apart their positions lie.
        rows = sum(span.length for span in q)
        return [Tile(0, rows, 0, rows, causal=True)]
    tiles, q0 = [], 0
    for a in q:
        k0 = 0
        for b in k:
            tiles += [tile.moved(q0, k0) for tile in _of_spans(a, b)]
            k0 += b.length
        q0 += a.length
    return tiles


def _of_spans(q: Span, k: Span) -> list[Tile]:
    if not q.length or not k.length or k.start > q.last:
        return []
    if k.last <= q.start:
        return [Tile(0, q.length, 0, k.length)]
    if k.length == 1:
        unseeing = -((q.start - k.start) // q.step)  # rows before the key: ceil of their distance
        return [Tile(unseeing, q.length, 0, 1)]
    if q.length == 1:
        return [Tile(0, 1, 0, (q.start - k.start) // k.step + 1)]
    if q.step == k.step:
        return _diagonal(q.length, k.length, (q.start - k.start) // k.step)
    # Different steps that interleave: row by row. Exact for any layout, fast for none.
    rows = (_of_spans(q.part(row, row + 1), k) for row in range(q.length))
    return [tile.moved(row, 0) for row, tiles in enumerate(rows) for tile in tiles]


def _diagonal(sq: int, sk: int, offset: int) -> list[Tile]:
    """Row i sees keys 0..i+offset: a rectangle before the diagonal, a triangle on it, one behind it."""
    first = max(0, -offset)  # rows above see nothing
    before = first + offset
    square = min(sq - first, sk - before)
    tiles = [Tile(first, first + square, before, before + square, causal=True)]
    if before:
        tiles.append(Tile(first, first + square, 0, before))
    if first + square < sq:
        tiles.append(Tile(first + square, sq, 0, sk))
    return tiles


def _coalesced(tiles: list[Tile]) -> list[Tile]:
    """Rectangles that share an edge become one: fewer, larger kernel calls."""
    triangles = [tile for tile in tiles if tile.causal]
    full = [tile for tile in tiles if not tile.causal]
    full = _fused(full, key=lambda t: (t.q0, t.q1), begin=lambda t: t.k0, end=lambda t: t.k1)
    full = _fused(full, key=lambda t: (t.k0, t.k1), begin=lambda t: t.q0, end=lambda t: t.q1)
    return triangles + full


def _fused(
    tiles: list[Tile],
    key: Callable[[Tile], tuple[int, int]],
    begin: Callable[[Tile], int],
    end: Callable[[Tile], int],
) -> list[Tile]:
    out: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: (key(t), begin(t))):
        if out and key(out[-1]) == key(tile) and end(out[-1]) == begin(tile):
            out[-1] = Tile(out[-1].q0, tile.q1, out[-1].k0, tile.k1)
        else:
            out.append(tile)
    return out
