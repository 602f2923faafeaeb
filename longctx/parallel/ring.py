"""Ring attention: each rank computes on one rank's tensors while the next rank's tensors are in flight.

Under a window, only the rows that another rank needs travel (`Ring.keys_to_send`, `Ring.queries_to_send`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longctx.attention.kernel import Gradients, Kernel, attend_over, attend_tiles, tile_gradients
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial, empty_partial, merge_
from longctx.attention.tiles import Tile, visible_tiles
from longctx.parallel.comm import Comm, Pending, Shape, doing
from longctx.parallel.merge import pack, unpack
from longctx.parallel.rows import Rows, add_rows_, count_rows, spans_of, take_rows, union_of
from longctx.shapes import Keys, Queries, Shaped, Tensor


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

        ``q_rows`` and ``k_rows`` are the rows of the two blocks that have arrived (None: all rows).  The tiles' indices
        count only these rows.  Results are cached, so that all layers share them.
        """
        key = q_rank, k_rank, q_rows, k_rows
        if key not in self._cache:
            queries, keys = self.queries.ranks[q_rank], self.keys.ranks[k_rank]
            self._cache[key] = visible_tiles(spans_of(queries, q_rows), spans_of(keys, k_rows), self.mask)
        tiles: tuple[Tile, ...] = self._cache[key]
        return tiles

    def keys_to_send(self, owner: int, hop: int, hops: int = 1) -> Rows | None:
        """Return the rows of ``owner``'s keys that at least one of ``hops`` ranks needs.

        These are consecutive ranks; the first is ``hop`` hops after the owner.  With ``hop=2, hops=3``, they are 2, 3
        and 4 hops after it.  None means all rows.  The result is None for ``hop=0``, and always without a window, since
        nearly all rows are needed.
        """
        return self._rows_to_send("keys", owner, hop, hops)

    def keys_on_hop(self, owner: int, hop: int) -> Rows | None:
        """Return the rows of ``owner``'s keys that travel on hop number ``hop``, counted from 1; None means all rows.

        They are the rows that the receiver of this hop or a later rank needs.
        """
        return self.keys_to_send(owner, hop, self.comm.size - hop)

    def sums_on_hop(self, owner: int, hop: int) -> Rows | None:
        """Return the rows of ``owner``'s keys whose summed gradients travel on hop number ``hop`` of the backward.

        Under a window, these are the rows that at least one rank before this hop, other than the owner, has seen.  None
        means all rows.
        """
        return self.keys_to_send(owner, 1, hop - 1)

    def queries_to_send(self, owner: int, hop: int, hops: int = 1) -> Rows | None:
        """Return the rows of ``owner``'s queries that see keys of at least one of ``hops`` ranks.

        The ranks are those of `keys_to_send`.  None means all rows.
        """
        return self._rows_to_send("queries", owner, hop, hops)

    def _rows_to_send(self, of: str, owner: int, hop: int, hops: int) -> Rows | None:
        """Compute the rows for `keys_to_send` (``of`` is "keys") or `queries_to_send` ("queries"), and cache them.

        See `keys_to_send` for ``owner``, ``hop`` and ``hops``.
        """
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
    ``rows(owner, hop)`` are the rows of ``owner``'s block that travel on hop number ``hop`` (None: all).  For hop 0 it
    must be None, and each hop may carry only rows that the previous hop carried.  Every rank must iterate to the end.

    Two buffers are alive: the current one, and the one in flight.  Delete the yielded tensors (``del``) before the next
    iteration; otherwise they stay alive as a third buffer.
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

    Returns the partial of this rank's queries over the keys of all N ranks.  Each rank sends N - 1 blocks of keys and
    values: the blocks of all ranks but the next one.
    """
    partial = None
    for owner, (k_o, v_o) in rotate(ring.comm, ring.keys, k, v, rows=ring.keys_on_hop):
        arrived = ring.keys_on_hop(owner, (ring.comm.rank - owner) % ring.comm.size)
        tiles = ring.tiles(ring.comm.rank, owner, k_rows=arrived)
        if partial is None:
            partial = attend_over(q, k_o, v_o, tiles, kernel)
        else:
            attend_tiles(partial, q, k_o, v_o, tiles, kernel)
        del k_o, v_o
    assert partial is not None
    return partial


def pass_q(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Ring attention in which keys and values stay and queries rotate (arXiv 2411.01783, Alg. 3).

    One all-to-all returns the partial results to the queries' ranks.  Bytes sent per rank: the queries of every rank
    but the next one, and the partials of all other ranks' queries: d values and one log-sum-exp per row and head,
    in the accumulation dtype (float32, or float64 for float64 inputs).  A rank without keys for a block of queries
    sends no partial for it.
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
            partial = attend_over(q_o, k, v, tiles, kernel)
            partials[owner] = take_rows(pack(partial), rows(owner, hop), ring.queries_to_send(owner, hop))
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
            merge_(merged, slice(first, end), unpack(packed[:, begin : begin + end - first]))
            begin += end - first
    return merged


def all_gather_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Attention over the keys and values of all ranks (Llama 3's training; arXiv 2411.01783, 3.5.2).

    One all-to-all brings them, in place of the N - 1 hops of `pass_kv`.  An all-gather would send the same rows to each
    rank, but under a window each rank needs other rows.  Bytes sent per rank: its keys and values, to each other rank.
    No computation hides the exchange, and the blocks of all ranks are in memory at once.
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


def local(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Return the attention of this rank's queries, which must see no keys of other ranks; sends no messages."""
    rank = ring.comm.rank
    assert not any(ring.tiles(rank, other) for other in range(ring.comm.size) if other != rank), "keys on another rank"
    partial = empty_partial(q)
    attend_tiles(partial, q, k, v, ring.tiles(rank, rank), kernel)
    return partial


def ring_gradients(
    dout: Queries, q: Queries, k: Keys, v: Keys, whole: Partial, ring: Ring, kernel: Kernel
) -> Gradients:
    """Return (dq, dk, dv) of this rank's rows, in the accumulation dtype, for any strategy's forward.

    ``whole`` is the forward's result.  Keys and values rotate as in `pass_kv`.  The gradients of a block's keys and
    values are summed on the way: the sum travels one hop after the block.  The last hop brings the complete sum to the
    block's owner.  Under a window, the sum has the rows of `Ring.sums_on_hop`, and the owner adds its own term at the
    end.
    """
    comm, dq = ring.comm, torch.zeros_like(whole.out)
    own: list[Tensor] | None = None
    sums: Pending | None = None
    for owner, (k_o, v_o) in rotate(comm, ring.keys, k, v, rows=ring.keys_on_hop):
        # 1. This rank's term of the gradients of ``owner``'s keys and values.
        hop = (comm.rank - owner) % comm.size
        tiles = ring.tiles(comm.rank, owner, k_rows=ring.keys_on_hop(owner, hop))
        dq_o, *term = tile_gradients(dout, q, k_o, v_o, whole, tiles, kernel)
        del k_o, v_o
        dq += dq_o
        if hop == 0 and (comm.size == 1 or ring.mask.before is not None):
            own = term
        # 2. Add the terms of the ranks before this one, and send the sum to the next rank.
        if comm.size > 1:
            term = _add_term(ring, owner, hop, term, sums.wait() if sums else None)
            next_owner = (owner - 1) % comm.size
            count = count_rows(ring.sums_on_hop(next_owner, hop + 1), ring.keys.rows(next_owner))
            sums = comm.shift(*term, shapes=[_with_rows(k, count)] * 2)
        del term
    # 3. The sums for this rank's own keys and values have arrived.
    arrived = sums.wait() if sums else ()
    if own is None:
        dk, dv = arrived
    else:
        for total, x in zip(own, arrived, strict=False):  # a ring of one has only its own term
            add_rows_(total, None, x, ring.sums_on_hop(comm.rank, comm.size) or ())
        dk, dv = own
    return dq, dk, dv


def _add_term(ring: Ring, owner: int, hop: int, term: list[Tensor], before: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the sums of gradients of ``owner``'s keys and values that a rank ``hop`` hops after it sends on.

    They are its own ``term`` plus the sums ``before`` that have arrived (None: none).  Under a window, the owner
    (``hop`` 0) leaves out its term.
    """
    rows, seen = ring.sums_on_hop(owner, hop + 1), ring.keys_to_send(owner, hop)
    if rows is None:
        return [x + y for x, y in zip(term, before, strict=True)] if before else term
    sums = [x.new_zeros(_with_rows(x, count_rows(rows, 0))) for x in term]
    if before is not None and seen is not None:  # the owner's term stays with the owner
        for total, x, y in zip(sums, term, before, strict=True):
            add_rows_(total, rows, take_rows(x, ring.keys_on_hop(owner, hop), seen), seen)
            add_rows_(total, rows, y, ring.sums_on_hop(owner, hop) or ())
    return sums
