"""The parts of the score matrix that a mask leaves visible, as rectangles and triangles that any kernel can compute.

For every layout, mask and cached turn, a ring step is a list of tiles of two shapes: a full rectangle, or a square
triangle with its diagonal (ARCHITECTURE.md says why).  No row of a tile is fully masked.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.spans import Span, Spans


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of scores: rows ``q0:q1`` of one rank's queries against rows ``k0:k1`` of one rank's keys.

    The two shapes, the second also mirrored, with three rows of queries against three of keys (x: computed)::

        full      causal=True      causal=True, mirrored=True
        x x x     x . .            x x x
        x x x     x x .            . x x
        x x x     x x x            . . x

    Causal tiles are square.  A mirrored one lies at the far edge of a window; with its rows and keys in reverse order
    it is a plain causal tile, so that kernels need no case for it.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    mirrored: bool = False

    @property
    def q(self) -> slice:
        """Slice of the rows of queries that the tile covers."""
        return slice(self.q0, self.q1)

    @property
    def k(self) -> slice:
        """Slice of the rows of keys that the tile covers."""
        return slice(self.k0, self.k1)

    @property
    def pairs(self) -> int:
        """Number of scores that this tile computes."""
        rows = self.q1 - self.q0
        return rows * (rows + 1) // 2 if self.causal else rows * (self.k1 - self.k0)

    def shift(self, q: int, k: int) -> "Tile":
        """Return this tile moved down by ``q`` query rows and right by ``k`` key rows."""
        return Tile(self.q0 + q, self.q1 + q, self.k0 + k, self.k1 + k, self.causal, self.mirrored)


def split_keys(tiles: Iterable[Tile], lengths: Sequence[int]) -> list[list[Tile]]:
    """Cut the keys into consecutive parts of ``lengths`` rows, and return the tiles of each part.

    In the result, key rows count from the beginning of the part.  Each tile must lie within one part, which holds if
    each part is a document.
    """
    ends = list(accumulate(lengths))
    parts: list[list[Tile]] = [[] for _ in lengths]
    for tile in tiles:
        part = bisect_right(ends, tile.k0)
        before = ends[part] - lengths[part]
        assert tile.k1 <= ends[part], "a tile spans two parts"
        parts[part].append(replace(tile, k0=tile.k0 - before, k1=tile.k1 - before))
    return parts


def visible_tiles(q: Spans, k: Spans, mask: Mask = CAUSAL) -> tuple[Tile, ...]:
    """Return tiles that cover exactly the pairs of a query and a key that ``mask`` allows, each pair once.

    ``q`` and ``k`` are the spans of the rank that holds the queries and of the rank that holds the keys.  A query sees
    only keys of its document; the time grows with the number of documents, not with its square.  A document of three
    tokens on two ranks:

    >>> from longctx.attention.layout import zigzag
    >>> last, first_two = zigzag(3, 2).ranks  # rank 0 holds position 2, rank 1 positions 0 and 1
    >>> visible_tiles(last, first_two)  # the last query sees both earlier keys
    (Tile(q0=0, q1=1, k0=0, k1=2, causal=False, mirrored=False),)
    >>> visible_tiles(first_two, first_two)  # a triangle: row 0 sees key 0, row 1 sees both
    (Tile(q0=0, q1=2, k0=0, k1=2, causal=True, mirrored=False),)
    >>> visible_tiles(first_two, last)  # the earlier queries do not see the last key
    ()
    """
    runs_of_document: dict[int, list[tuple[int, Spans]]] = {}
    for k0, k_spans in _group_by_document(k):
        runs_of_document.setdefault(k_spans[0].document, []).append((k0, k_spans))
    tiles: list[Tile] = []
    for q0, q_spans in _group_by_document(q):
        for k0, k_spans in runs_of_document.get(q_spans[0].document, ()):
            tiles += [tile.shift(q0, k0) for tile in _tile_document(q_spans, k_spans, mask)]
    return tuple(_merge_rectangles(tiles))


def _group_by_document(spans: Spans) -> Iterator[tuple[int, Spans]]:
    """Yield (first row, spans) of each run of consecutive spans of one document."""
    begin = 0
    for _, group in groupby(spans, key=lambda span: span.document):
        run = tuple(group)
        yield begin, run
        begin += sum(span.length for span in run)


def _tile_document(q: Spans, k: Spans, mask: Mask) -> list[Tile]:
    """Return the tiles of spans of one document; rows count from the first span of ``q`` and of ``k``."""
    ascending = all(a.last < b.start for a, b in pairwise(q))
    if mask == CAUSAL and q == k and ascending:
        # The same rows in ascending order: row i sees rows 0 to i, whatever their positions are.
        rows = sum(span.length for span in q)
        return [Tile(0, rows, 0, rows, causal=True)]
    tiles, q0 = [], 0
    for a in q:
        k0 = 0
        for b in k:
            tiles += [tile.shift(q0, k0) for tile in _tile_spans(a, b, mask)]
            k0 += b.length
        q0 += a.length
    return tiles


def _tile_spans(q: Span, k: Span, mask: Mask) -> list[Tile]:
    """Return the tiles of one span of queries against one span of keys."""
    if mask.before is None and (mask.after is None or k.last <= q.start + mask.after):
        return [Tile(0, q.length, 0, k.length)]  # every query sees every key, whatever the steps are
    if q.length > 1 and k.length > 1 and q.step != k.step:
        # Interleaved spans of different steps are cut row by row: exact, but many small tiles.
        rows = (_tile_spans(q.part(row, row + 1), k, mask) for row in range(q.length))
        return [tile.shift(row, 0) for row, tiles in enumerate(rows) for tile in tiles]
    step = k.step if q.length == 1 else q.step
    # From positions to rows: query row i sees key rows i + low to i + high.
    offset, unbounded = q.start - k.start, q.length + k.length
    low = -unbounded if mask.before is None else -((mask.before - offset) // step)
    high = unbounded if mask.after is None else (offset + mask.after) // step
    return _tile_band(q.length, k.length, low, high)


def _tile_band(sq: int, sk: int, low: int, high: int) -> list[Tile]:
    """Return the tiles of a band of ``sq`` rows: row i sees keys i + ``low`` to i + ``high``, within 0 to ``sk`` - 1.

    From row ``-low`` on, the band has a lower edge: row i does not see the keys before i + ``low``.  Before row ``sk -
    high``, it has an upper edge: row i does not see the keys after i + ``high``.  Elsewhere the border of the matrix is
    the limit.  Each edge takes a triangle; a rectangle fills the space between.
    """
    first, end = max(0, -high), min(sq, sk - low)
    if low > high or first >= end:
        return []
    cuts = sorted({first, end, *(row for row in (-low, sk - high) if first < row < end)})
    tiles: list[Tile] = []
    for begin, stop in pairwise(cuts):
        has_lower, has_upper = begin >= -low, begin < sk - high
        # With both edges, triangles of more rows than ``high - low`` would overlap.
        rows = max(1, high - low) if has_lower and has_upper else stop - begin
        for a in range(begin, stop, rows):
            tiles += _tile_edges(a, min(a + rows, stop), sk, low if has_lower else None, high if has_upper else None)
    return tiles


def _tile_edges(a: int, b: int, sk: int, low: int | None, high: int | None) -> Iterator[Tile]:
    """Yield the tiles of rows ``a`` to ``b`` (exclusive), where row i sees keys i + ``low`` to i + ``high``.

    An edge of None is the border of the matrix.  With both edges, there are at most ``high - low`` rows, or one.
    """
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


def _merge_rectangles(tiles: list[Tile]) -> list[Tile]:
    """Return ``tiles`` with rectangles that share an edge merged, for fewer and larger kernel calls."""
    triangles = [tile for tile in tiles if tile.causal]
    full = [tile for tile in tiles if not tile.causal]
    full = _merge_adjacent(full, key=lambda t: (t.q0, t.q1), begin=lambda t: t.k0, end=lambda t: t.k1)
    full = _merge_adjacent(full, key=lambda t: (t.k0, t.k1), begin=lambda t: t.q0, end=lambda t: t.q1)
    return triangles + full


def _merge_adjacent(
    tiles: list[Tile],
    key: Callable[[Tile], tuple[int, int]],
    begin: Callable[[Tile], int],
    end: Callable[[Tile], int],
) -> list[Tile]:
    """Merge rectangles that have the same ``key`` and touch: the ``end`` of one is the ``begin`` of the next."""
    out: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: (key(t), begin(t))):
        if out and key(out[-1]) == key(tile) and end(out[-1]) == begin(tile):
            out[-1] = Tile(out[-1].q0, tile.q1, out[-1].k0, tile.k1)
        else:
            out.append(tile)
    return out
