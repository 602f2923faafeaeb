"""Rows that travel around a ring, and blocks that are computed, under a sliding window of w keys.

The layout is zigzag: a sequence has 2 N chunks, and rank r has chunks r and 2 N - 1 - r.  A query sees its own
key and the w - 1 keys before it.  If g positions lie between a chunk of keys and a later chunk of queries, only the
first w - 1 - g queries see keys of that chunk, and they see only its last w - 1 - g keys.  Of a chunk with fewer rows,
all count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Reach:
    """Rows and blocks of one rank, as means over the ranks.

    * ``kv_hops``, ``q_hops``: rows of keys in pass-KV, and of queries in pass-Q, on each of N - 1 hops.
    * ``sum_hops``: rows of summed gradients on each of N hops of the backward; 0 on the first hop under a window.
    * ``kv_rows``: rows of the rank's keys, each counted once for every other rank that sees it.
    * ``q_rows``: rows of the rank's queries, each counted once for every other rank whose keys it sees.
    * ``kv_read``: rows of keys that the rank's queries see, the rank's own rows included.
    * ``blocks``: number of ranks whose keys the rank's queries see, the rank itself included.
    """

    kv_hops: tuple[float, ...]
    q_hops: tuple[float, ...]
    sum_hops: tuple[float, ...]
    kv_rows: float
    q_rows: float
    kv_read: float
    blocks: float


@lru_cache(maxsize=256)
def reach_of(new: tuple[int, ...], cached: tuple[int, ...], ranks: int, window: int | None) -> Reach:
    """Return the `Reach` of ``window`` (None: no window) for sequences of ``new`` tokens after ``cached`` ones."""
    if window is None:
        kv, q, others = (sum(new) + sum(cached)) / ranks, sum(new) / ranks, ranks - 1
        sums = (kv,) * ranks if others else ()
        kv_hops, q_hops = (kv,) * others, (q,) * others
        return Reach(kv_hops, q_hops, sums, sum(kv_hops), sum(q_hops), ranks * kv, ranks)
    keys: list[list[int]] = []
    queries: list[list[int]] = []
    pairs: set[tuple[int, int]] = set()
    for t, p in zip(new, cached, strict=True):
        q_chunks = _chunks(p, t, ranks)
        k_chunks = _chunks(0, p, ranks) + q_chunks
        for k in k_chunks:
            seen = _seen_by_hop(k, (q for q in q_chunks if q.begin >= k.begin), ranks, window)
            keys.append(seen)
            pairs |= {(k.rank, hop) for hop in range(ranks) if seen[hop]}
        queries += [_seen_by_hop(q, (k for k in k_chunks if k.begin <= q.begin), ranks, window) for q in q_chunks]
    hops, unit = range(1, ranks), 2 * ranks * ranks  # N for the mean over ranks, 2 N for the unit of `_Chunk`
    return Reach(
        tuple(sum(max(seen[hop:]) for seen in keys) / unit for hop in hops),
        tuple(sum(max(seen[hop:]) for seen in queries) / unit for hop in hops),
        (0.0, *(sum(max(seen[1 : hop + 1]) for seen in keys) / unit for hop in hops)) if hops else (),
        sum(sum(seen[1:]) for seen in keys) / unit,
        sum(sum(seen[1:]) for seen in queries) / unit,
        sum(map(sum, keys)) / unit,
        len(pairs) / ranks,
    )


def most_keys(total: int, ranks: int, window: int | None) -> float:
    """Return the number of keys that the last of ``total`` tokens sees on the rank where it sees most, in zigzag order.

    The other ranks wait for that rank.  Rank r has chunks r and 2 N - 1 - r; a window is the last w positions.
    """
    if window is None:
        return total / ranks
    chunk, seen = total / (2 * ranks), min(window, total)

    def of_chunk(after: int) -> float:
        return min(chunk, max(0.0, seen - after * chunk))

    return max(of_chunk(rank) + of_chunk(2 * ranks - 1 - rank) for rank in range(ranks))


@dataclass(frozen=True)
class _Chunk:
    """A chunk of the sequence that ``rank`` holds, from ``begin`` to ``end`` (exclusive).

    Both are positions times 2 N, for N ranks, so that they are integers even if 2 N does not divide the length.
    """

    begin: int
    end: int
    rank: int


def _chunks(begin: int, length: int, ranks: int) -> list[_Chunk]:
    """Return the 2 N equal chunks of ``length`` positions from ``begin`` on, in order of position; N is ``ranks``."""
    if not length:
        return []
    first, last = 2 * ranks * begin, 2 * ranks - 1
    return [_Chunk(first + i * length, first + (i + 1) * length, min(i, last - i)) for i in range(2 * ranks)]


def _seen_by_hop(chunk: _Chunk, others: Iterable[_Chunk], ranks: int, window: int) -> list[int]:
    """Return how many rows of ``chunk`` are in a visible pair with a row of ``others``, as a list by hop.

    Entry h is for the chunks on the rank that lies h hops after ``chunk``'s rank.  Numbers of rows are times 2 N, as in
    `_Chunk`.
    """
    seen, size = [0] * ranks, chunk.end - chunk.begin
    for other in others:
        gap = max(other.begin - chunk.end, chunk.begin - other.end)  # negative for the chunk itself
        hop = (other.rank - chunk.rank) % ranks
        seen[hop] = max(seen[hop], size if gap < 0 else min(size, 2 * ranks * (window - 1) - gap))
    return seen
