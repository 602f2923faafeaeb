"""Ring attention: each rank computes on one rank's tensors while the next rank's tensors are in flight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longctx.attention.kernel import Gradients, Kernel, attend_tiles, tile_gradients
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial, empty_partial, merge_, sink
from longctx.attention.tiles import Tile, visible_tiles
from longctx.parallel.comm import Comm, Shape, doing
from longctx.parallel.rows import Rows, count_rows, spans_of, take_rows, union_of
from longctx.shapes import Float, Keys, Queries, Shaped, Tensor


@dataclass(frozen=True)
class Ring:
    """A ring of ranks, the layouts by which queries and keys are sharded over it, and the mask."""

    comm: Comm
    queries: Layout
    keys: Layout
    mask: Mask = CAUSAL
    _cache: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def tiles(
        self, q_rank: int, k_rank: int, *, q_rows: Rows | None = None, k_rows: Rows | None = None
    ) -> tuple[Tile, ...]:
        """Return the tiles that are visible between the queries of ``q_rank`` and the keys of ``k_rank``.

        ``q_rows`` and ``k_rows`` are the rows of the two blocks that have arrived (None: all rows).  Results are
        cached, so that all layers share them.
        """
        key = q_rank, k_rank, q_rows, k_rows
        if key not in self._cache:
            queries, keys = self.queries.ranks[q_rank], self.keys.ranks[k_rank]
            self._cache[key] = visible_tiles(spans_of(queries, q_rows), spans_of(keys, k_rows), self.mask)
        tiles: tuple[Tile, ...] = self._cache[key]
        return tiles

    def keys_to_send(self, owner: int, hop: int, hops: int = 1) -> Rows | None:
        """Return the rows of ``owner``'s keys that a rank between ``hop`` and ``hop + hops - 1`` hops away needs.

        None means all rows.  Without a window the result is always None, since nearly all rows are needed.
        """
        return self._rows_to_send("keys", owner, hop, hops)

    def queries_to_send(self, owner: int, hop: int, hops: int = 1) -> Rows | None:
        """Return the rows of ``owner``'s queries that see a key of a rank ``hop`` to ``hop + hops - 1`` hops away."""
        return self._rows_to_send("queries", owner, hop, hops)

    def _rows_to_send(self, of: str, owner: int, hop: int, hops: int) -> Rows | None:
        """Return `keys_to_send` or `queries_to_send`, as ``of`` says; results are cached."""
        if self.mask.before is None or hop == 0:
            return None
        key = of, owner, hop, hops
        if key not in self._cache:
            others = [(owner + n) % self.comm.size for n in range(hop, hop + hops)]
            if of == "keys":
                ranges = [(tile.k0, tile.k1) for other in others for tile in self.tiles(other, owner)]
            else:
                ranges = [(tile.q0, tile.q1) for other in others for tile in self.tiles(owner, other)]
            self._cache[key] = union_of(ranges)
        rows: Rows = self._cache[key]
        return rows


Strategy = Callable[[Queries, Keys, Keys, Ring, Kernel], Partial]


def _with_rows(x: Tensor, rows: int) -> Shape:
    return (x.shape[0], rows, *x.shape[2:])


def rotate(
    comm: Comm,
    layout: Layout,
    *mine: Shaped[Tensor, "b _ ..."],
    rows: Callable[[int, int], Rows | None] = lambda _owner, _hop: None,
) -> Iterator[tuple[int, tuple[Shaped[Tensor, "b _ ..."], ...]]]:
    """Yield (owner, tensors) for every rank, this rank first, while the next rank's tensors are in flight.

    Example: on rank 2 of 4 the owners are 2, 1, 0, 3.  ``layout`` gives each owner's number of rows (dim 1).
    ``rows(owner, hop)`` are the rows of ``owner``'s block that travel on hop number ``hop`` (None: all).  Each hop
    may carry only rows that the previous hop carried.  Two buffers are alive: the current one, and the one in flight.
    Delete the yielded tensors (``del``) before the next iteration; otherwise they stay alive as a third buffer.
    """
    current = mine
    for hop in range(1, comm.size):
        owner, next_owner = (comm.rank - hop + 1) % comm.size, (comm.rank - hop) % comm.size
        count = count_rows(rows(next_owner, hop), layout.rows(next_owner))
        name = f"hop {hop} of {comm.size - 1} of the ring"
        with doing(name):
            sent = [take_rows(x, rows(owner, hop - 1), rows(owner, hop)) for x in current]
            pending = comm.shift(*sent, shapes=[_with_rows(x, count) for x in mine])
        del sent
        yield owner, current
        with doing(name):
            current = pending.wait()
        del pending  # it also keeps the tensors alive that were sent
    yield (comm.rank + 1) % comm.size, current


def pass_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Ring attention in which queries stay and keys and values rotate (arXiv 2411.01783, Alg. 2).

    Each rank sends N - 1 blocks of keys and values: the blocks of all ranks but the next one.  Under a window, a hop
    carries only the rows that a later rank sees.
    """
    partial, size = empty_partial(q), ring.comm.size

    def rows(owner: int, hop: int) -> Rows | None:
        return ring.keys_to_send(owner, hop, size - hop)

    for owner, (k_o, v_o) in rotate(ring.comm, ring.keys, k, v, rows=rows):
        arrived = rows(owner, (ring.comm.rank - owner) % size)
        attend_tiles(partial, q, k_o, v_o, ring.tiles(ring.comm.rank, owner, k_rows=arrived), kernel)
        del k_o, v_o
    return partial


def pass_q(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Ring attention in which keys and values stay and queries rotate (arXiv 2411.01783, Alg. 3).

    One all-to-all returns the partial results to the queries' ranks.  Bytes sent per rank: the queries of every rank
    but the next one, and the partials of all other ranks' queries: d values and one log-sum-exp per row and head,
    in the accumulation dtype (float32, or float64 for float64 inputs).  A rank without keys for a block of queries
    sends no partial for it.  Under a window, only the rows that see a key of another rank travel and return.
    """
    comm, size = ring.comm, ring.comm.size
    merged = empty_partial(q)

    def rows(owner: int, hop: int) -> Rows | None:
        return ring.queries_to_send(owner, hop, size - hop)

    # 1. Attend to this rank's keys with every rank's queries.
    no_rows: Shape = (q.shape[0], 0, q.shape[2], q.shape[3] + 1)
    partials = [merged.out.new_empty(no_rows)] * size
    for owner, (q_o,) in rotate(comm, ring.queries, q, rows=rows):
        hop = (comm.rank - owner) % size
        if tiles := ring.tiles(owner, comm.rank, q_rows=rows(owner, hop)):
            partial = empty_partial(q_o)
            attend_tiles(partial, q_o, k, v, tiles, kernel)
            partials[owner] = take_rows(_pack(partial), rows(owner, hop), ring.queries_to_send(owner, hop))
        del q_o

    # 2. Return the partials to the ranks that own the queries, and merge.
    returned = [ring.queries_to_send(comm.rank, (other - comm.rank) % size) for other in range(size)]
    has_keys = [bool(ring.tiles(comm.rank, other)) for other in range(size)]
    counts = [count_rows(rows, q.shape[1]) if has else 0 for rows, has in zip(returned, has_keys, strict=True)]
    with doing("returning partial results"):
        partials = comm.all_to_all(partials, [_with_rows(partials[0], count) for count in counts])
    for packed, ranges in zip(partials, returned, strict=True):
        begin = 0
        for first, end in ranges if ranges is not None else [(0, packed.shape[1])]:
            merge_(merged, slice(first, end), _unpack(packed[:, begin : begin + end - first]))
            begin += end - first
    return merged


def _pack(partial: Partial) -> Tensor:
    """Pack ``out`` [b s h d] and ``lse`` [b s h] into one tensor [b s h d+1], which travels as one message."""
    return torch.cat([partial.out, partial.lse.unsqueeze(-1)], -1)


def _unpack(packed: Tensor) -> Partial:
    return Partial(packed[..., :-1], packed[..., -1])


def all_gather_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Attention over all keys and values after one all-gather (Llama 3's training; arXiv 2411.01783, 3.5.2).

    It sends the bytes of `pass_kv` in one exchange instead of N - 1 hops.  No computation hides the exchange, and the
    blocks of all ranks are in memory at once.  Bytes sent per rank: its keys and values, to each other rank.  Under a
    window, each of these ranks gets only the rows that it sees.
    """
    comm, partial = ring.comm, empty_partial(q)
    both = torch.cat([k, v], -1)
    sent = [ring.keys_to_send(comm.rank, (other - comm.rank) % comm.size) for other in range(comm.size)]
    received = [ring.keys_to_send(owner, (comm.rank - owner) % comm.size) for owner in range(comm.size)]
    shapes = [_with_rows(both, count_rows(rows, ring.keys.rows(owner))) for owner, rows in enumerate(received)]
    with doing("gathering keys and values"):
        gathered = comm.all_to_all([take_rows(both, None, rows) for rows in sent], shapes)
    for owner, (block, rows) in enumerate(zip(gathered, received, strict=True)):
        k_o, v_o = block.chunk(2, -1)
        attend_tiles(partial, q, k_o, v_o, ring.tiles(comm.rank, owner, k_rows=rows), kernel)
    return partial


def gather_merge(partial: Partial, comm: Comm, ulysses: int, sinks: Float[Tensor, " hq"] | None = None) -> Queries:
    """Merge all ranks' partials of the same query rows with one all-gather (tree decoding).

    Every rank passes its ``partial`` [b s hq/U d] of the same rows, with U = ``ulysses``, and gets the attention output
    [b s hq d].  Rank = ring rank * U + ulysses rank: Ulysses ranks hold different heads, ring ranks different
    keys.  ``sinks`` are the sink scores of all hq heads, which are merged once, after the keys of all ranks.  All ranks
    merge the same partials in the same order.  Bytes sent per rank: d values and one log-sum-exp per row and head, in
    the accumulation dtype, to each other rank.
    """
    mine = _pack(partial)
    with doing("merging partial results"):
        gathered = comm.all_gather(mine, [tuple(mine.shape)] * comm.size)
    heads = []
    for member in range(ulysses):
        merged = empty_partial(partial.out)
        for packed in gathered[member::ulysses]:
            merge_(merged, slice(None), _unpack(packed))
        if sinks is not None:
            merge_(merged, slice(None), sink(sinks.chunk(ulysses)[member], merged))
        heads.append(merged.out)
    return torch.cat(heads, 2)


def _merge_packed(parts: Sequence[Float[Tensor, "b s h packed"]]) -> Partial:
    """Merge packed partials of the same rows in one step, with less overhead than repeated `merge_`."""
    stacked = torch.stack(list(parts))
    out, lse = stacked[..., :-1], stacked[..., -1]
    unseen, total = lse == -torch.inf, lse.logsumexp(0)
    share = torch.exp(lse - total).masked_fill(unseen, 0.0)
    # A partial over no keys has weight 0.  Its values are masked, because 0 times NaN is NaN.
    return Partial((out.masked_fill(unseen.unsqueeze(-1), 0.0) * share.unsqueeze(-1)).sum(0), total)


def scatter_merge(
    partial: Partial,
    comm: Comm,
    ulysses: int,
    heads: Sequence[range],
    sinks: Float[Tensor, " hq"] | None = None,
) -> Float[Tensor, "b sq share d"]:
    """Merge all ranks' partials of the same query rows with one all-to-all; each rank merges some of the heads.

    Example: with 9 heads on 2 ranks, rank 0 returns heads 0 to 3 and rank 1 heads 4 to 8.

    As in `gather_merge`, every rank passes its ``partial`` [b s hq/U d] of the same rows.  Rank r gets the attention
    output [b s len(heads[r]) d] of the query heads ``heads[r]``.  ``sinks`` are the sink scores of all heads (see
    `partial.sink`).  Per row and head that another rank merges, a rank sends d values and one log-sum-exp, in the
    accumulation dtype.
    """
    width, member = partial.out.shape[2], comm.rank % ulysses

    def common(owner: int, of_member: int) -> slice:
        """Return the heads of ``owner`` among those that the Ulysses rank ``of_member`` attends with."""
        begin = max(0, heads[owner].start - of_member * width)
        return slice(begin, max(begin, min(width, heads[owner].stop - of_member * width)))

    mine = _pack(partial)
    shares = [common(comm.rank, rank % ulysses) for rank in range(comm.size)]
    shapes = [(*mine.shape[:2], share.stop - share.start, mine.shape[3]) for share in shares]
    with doing("merging partial results"):
        parts = comm.all_to_all([mine[:, :, common(owner, member)] for owner in range(comm.size)], shapes, small=True)
    merged = _merge_packed([torch.cat(parts[i : i + ulysses], 2) for i in range(0, comm.size, ulysses)])
    if sinks is not None:
        owned = heads[comm.rank]
        merge_(merged, slice(None), sink(sinks[owned.start : owned.stop], merged))
    return merged.out


def ring_gradients(
    dout: Queries, q: Queries, k: Keys, v: Keys, whole: Partial, ring: Ring, kernel: Kernel
) -> Gradients:
    """Return (dq, dk, dv) of this rank's rows, in the accumulation dtype, for any strategy's forward.

    ``whole`` is the forward's result.  Keys and values rotate again.  The sums of their gradients follow one hop later,
    and the last hop brings each sum, complete, to the rank that owns the keys.
    """
    comm = ring.comm
    dq = torch.zeros_like(whole.out)
    sums = None
    dk = dv = torch.empty(0)
    for owner, (k_o, v_o) in rotate(comm, ring.keys, k, v):
        tiles = ring.tiles(comm.rank, owner)
        dq_o, dk, dv = tile_gradients(dout, q, k_o, v_o, whole, tiles, kernel)
        del k_o, v_o
        dq += dq_o
        if sums:
            dk_before, dv_before = sums.wait()
            dk, dv = dk + dk_before, dv + dv_before
        if comm.size > 1:
            following = ring.keys.rows((owner - 1) % comm.size)
            sums = comm.shift(dk, dv, shapes=[_with_rows(k, following)] * 2)
    if sums:
        dk, dv = sums.wait()
    return dq, dk, dv
