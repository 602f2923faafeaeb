"""Where queries meet keys: two sets of spans in, the rectangles and triangles of the score matrix out.

Every ring step of every layout, mask and turn over a cache is a list of tiles of two shapes only: a full
rectangle, or a square triangle with its diagonal.  All attention kernels agree on those two, whichever corner
their causal mask is aligned to, and no row of a tile is ever fully masked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from longctx.attention.layout import Span, Spans
from longctx.attention.mask import CAUSAL, Mask


@dataclass(frozen=True, slots=True)
class Tile:
    """Local rows ``q0:q1`` of the queries see rows ``k0:k1`` of the keys; all, or (``causal``) the lower triangle.

    A ``mirrored`` triangle is the upper one, the far edge of a window: with rows and keys read backwards, a lower one.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    mirrored: bool = False

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
        return replace(self, q0=self.q0 + q, q1=self.q1 + q, k0=self.k0 + k, k1=self.k1 + k)


def visible_tiles(q: Spans, k: Spans, mask: Mask = CAUSAL) -> tuple[Tile, ...]:
    """The tiles in which a query sees a key of its document that ``mask`` allows."""
    tiles: list[Tile] = []
    for q0, q_spans in _runs(q):
        for k0, k_spans in _runs(k):
            if q_spans[0].document != k_spans[0].document:
                continue
            tiles += [tile.moved(q0, k0) for tile in _of_runs(q_spans, k_spans, mask)]
    return tuple(_coalesced(tiles))


def _runs(spans: Spans) -> Iterator[tuple[int, Spans]]:
    """Neighbouring spans of one document, with the row that they begin at."""
    begin = 0
    for _, group in groupby(spans, key=lambda span: span.document):
        run = tuple(group)
        yield begin, run
        begin += sum(span.length for span in run)


def _of_runs(q: Spans, k: Spans, mask: Mask) -> list[Tile]:
    ascending = all(a.last < b.start for a, b in pairwise(q))
    if mask == CAUSAL and q == k and ascending:
        # The same rows in order: row i sees rows 0..i, however far apart their positions lie.
        rows = sum(span.length for span in q)
        return [Tile(0, rows, 0, rows, causal=True)]
    tiles, q0 = [], 0
    for a in q:
        k0 = 0
        for b in k:
            tiles += [tile.moved(q0, k0) for tile in _of_spans(a, b, mask)]
            k0 += b.length
        q0 += a.length
    return tiles


def _of_spans(q: Span, k: Span, mask: Mask) -> list[Tile]:
    if mask.before is None and (mask.after is None or k.last <= q.start + mask.after):
        return [Tile(0, q.length, 0, k.length)]  # all of it lies behind, whatever the steps
    if q.length > 1 and k.length > 1 and q.step != k.step:
        # Different steps that interleave: row by row. Exact for any layout, fast for none.
        rows = (_of_spans(q.part(row, row + 1), k, mask) for row in range(q.length))
        return [tile.moved(row, 0) for row, tiles in enumerate(rows) for tile in tiles]
    step = k.step if q.length == 1 else q.step
    ahead, all_rows = q.start - k.start, q.length + k.length
    low = -all_rows if mask.before is None else -((mask.before - ahead) // step)
    high = all_rows if mask.after is None else (ahead + mask.after) // step
    return _band(q.length, k.length, low, high)


def _band(sq: int, sk: int, low: int, high: int) -> list[Tile]:
    """Row i sees those of the keys i + low to i + high that exist.

    Rows from ``-low`` on leave keys behind, and have a triangle on that edge; those before ``sk - high`` have keys
    ahead of them, and one on this edge; between the triangles lies a rectangle.
    """
    first, end = max(0, -high), min(sq, sk - low)
    if low > high or first >= end:
        return []
    cuts = sorted({first, end, *(row for row in (-low, sk - high) if first < row < end)})
    tiles: list[Tile] = []
    for begin, stop in pairwise(cuts):
        far, near = begin >= -low, begin < sk - high
        # Two triangles of more rows than the band is wide would overlap.
        rows = max(1, high - low) if far and near else stop - begin
        for a in range(begin, stop, rows):
            tiles += _edges(a, min(a + rows, stop), sk, low if far else None, high if near else None)
    return tiles


def _edges(a: int, b: int, sk: int, low: int | None, high: int | None) -> Iterator[Tile]:
    """Rows a to b (exclusive) of a band, whose edges, where they have one, meet no border."""
    if b - a == 1:
        yield Tile(a, b, 0 if low is None else a + low, sk if high is None else a + high + 1)
        return
    left, right = 0 if low is None else b + low, sk if high is None else a + high
    if high is not None:
        yield Tile(a, b, a + high, b + high, causal=True)
    if low is not None:
        yield Tile(a, b, a + low, b + low, causal=True, mirrored=True)
    if left < right:
        yield Tile(a, b, left, right)


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
