"""Ring attention: each rank computes on one rank's tensors while the next rank's tensors are in flight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from longctx.attention.kernel import Gradients, Kernel, attend_tiles, tile_gradients
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial, empty_partial, merge_, sink
from longctx.attention.tiles import Tile, visible_tiles
from longctx.parallel.comm import Comm, Shape, doing
from longctx.shapes import Float, Keys, Queries, Shaped, Tensor


@dataclass(frozen=True)
class Ring:
    """A ring of ranks, the layouts by which queries and keys are sharded over it, and the mask."""

    comm: Comm
    queries: Layout
    keys: Layout
    mask: Mask = CAUSAL
    _tiles: dict[tuple[int, int], tuple[Tile, ...]] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, q_rank: int, k_rank: int) -> tuple[Tile, ...]:
        """Return the tiles that are visible between the queries of ``q_rank`` and the keys of ``k_rank``.

        Each pair is computed once and then shared by all layers.
        """
        pair = q_rank, k_rank
        if pair not in self._tiles:
            self._tiles[pair] = visible_tiles(self.queries.ranks[q_rank], self.keys.ranks[k_rank], self.mask)
        return self._tiles[pair]

    @cached_property
    def key_hops(self) -> int:
        """Hops that keys must travel to reach every query that sees them: N - 1, or fewer under a window."""
        return self._hops(self.tiles)

    @cached_property
    def query_hops(self) -> int:
        """Hops that queries must travel to reach every key that they see."""
        return self._hops(lambda rank, owner: self.tiles(owner, rank))

    def _hops(self, tiles_between: Callable[[int, int], tuple[Tile, ...]]) -> int:
        """Return the largest number of hops after which a (rank, owner) pair still has tiles."""
        size = self.comm.size
        used = (n for n in range(size - 1, 0, -1) for rank in range(size) if tiles_between(rank, (rank - n) % size))
        return next(used, 0)


Strategy = Callable[[Queries, Keys, Keys, Ring, Kernel], Partial]


def _with_rows(x: Tensor, rows: int) -> Shape:
    return (x.shape[0], rows, *x.shape[2:])


def rotate(
    comm: Comm, layout: Layout, *mine: Shaped[Tensor, "b _ ..."], hops: int | None = None
) -> Iterator[tuple[int, tuple[Shaped[Tensor, "b _ ..."], ...]]]:
    """Yield (owner, tensors) for every rank, this rank first, while the next rank's tensors are in flight.

    Example: on rank 2 of 4 the owners are 2, 1, 0, 3.  ``layout`` gives each owner's number of rows (dim 1).
    ``hops`` (N - 1 if None, the same on every rank) ends the rotation early.  Two buffers are alive, the current one
    and the one in flight.  Delete what was yielded (``del``) before the next iteration, or it stays alive as a third.
    """
    current = mine
    hops = comm.size - 1 if hops is None else hops
    for step in range(hops):
        previous = (comm.rank - step - 1) % comm.size
        shapes = [_with_rows(x, layout.rows(previous)) for x in mine]
        hop = f"hop {step + 1} of {hops} of the ring"
        with doing(hop):
            pending = comm.shift(*current, shapes=shapes)
        yield (comm.rank - step) % comm.size, current
        with doing(hop):
            current = pending.wait()
        del pending  # it also keeps the tensors alive that were sent
    yield (comm.rank - hops) % comm.size, current


def pass_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Ring attention in which queries stay and keys and values rotate (arXiv 2411.01783, Alg. 2).

    Each rank sends N - 1 blocks of keys and values: those of all ranks but the next one.  Under a window it sends
    `Ring.key_hops` blocks.
    """
    partial = empty_partial(q)
    for owner, (k_o, v_o) in rotate(ring.comm, ring.keys, k, v, hops=ring.key_hops):
        attend_tiles(partial, q, k_o, v_o, ring.tiles(ring.comm.rank, owner), kernel)
        del k_o, v_o
    return partial


def pass_q(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Ring attention in which keys and values stay and queries rotate (arXiv 2411.01783, Alg. 3).

    One all-to-all returns the partial results to the queries' ranks.  Bytes sent per rank: the queries of every rank
    but the next one, and the partials of all other ranks' queries: d values and one log-sum-exp per row and head,
    in the accumulation dtype (float32, or float64 for float64 inputs).  A rank without keys for a block of queries
    sends no partial for it.
    """
    comm = ring.comm
    merged = empty_partial(q)

    # 1. Attend to this rank's keys with every rank's queries.
    no_rows: Shape = (q.shape[0], 0, q.shape[2], q.shape[3] + 1)
    partials = [merged.out.new_empty(no_rows)] * comm.size
    for owner, (q_o,) in rotate(comm, ring.queries, q, hops=ring.query_hops):
        if tiles := ring.tiles(owner, comm.rank):
            partial = empty_partial(q_o)
            attend_tiles(partial, q_o, k, v, tiles, kernel)
            partials[owner] = _pack(partial)
        del q_o

    # 2. Return the partials to the ranks that own the queries, and merge.
    shapes = [_with_rows(partials[0], q.shape[1] if ring.tiles(comm.rank, other) else 0) for other in range(comm.size)]
    with doing("returning partial results"):
        partials = comm.all_to_all(partials, shapes)
    for packed in partials:
        merge_(merged, slice(0, packed.shape[1]), _unpack(packed))
    return merged


def _pack(partial: Partial) -> Tensor:
    """Pack ``out`` [b s h d] and ``lse`` [b s h] into one tensor [b s h d+1], which travels as one message."""
    return torch.cat([partial.out, partial.lse.unsqueeze(-1)], -1)


def _unpack(packed: Tensor) -> Partial:
    return Partial(packed[..., :-1], packed[..., -1])


def all_gather_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Attention over all keys and values after one all-gather (Llama 3's training; arXiv 2411.01783, 3.5.2).

    It sends the bytes of `pass_kv` in one exchange instead of N - 1 hops.  No computation hides the exchange, and the
    blocks of all ranks are in memory at once.  Bytes sent per rank: its keys and values, to each other rank.
    """
    comm, partial = ring.comm, empty_partial(q)
    both = torch.cat([k, v], -1)
    shapes = [_with_rows(both, ring.keys.rows(owner)) for owner in range(comm.size)]
    with doing("gathering keys and values"):
        gathered = comm.all_gather(both, shapes)
    for owner, block in enumerate(gathered):
        k_o, v_o = block.chunk(2, -1)
        attend_tiles(partial, q, k_o, v_o, ring.tiles(comm.rank, owner), kernel)
    return partial


def gather_merge(partial: Partial, comm: Comm, ulysses: int) -> Queries:
    """Merge all ranks' partials of the same query rows with one all-gather (tree decoding).

    Every rank passes its ``partial`` [b s hq/U d] of the same rows and gets the attention output [b s hq d], with
    U = ``ulysses``.  Rank = ring rank * U + ulysses rank: Ulysses ranks hold different heads, ring ranks different
    keys.  All ranks merge the same partials in the same order.  Bytes sent per rank: d values and one log-sum-exp per
    row and head, in the accumulation dtype, to each other rank.
    """
    mine = _pack(partial)
    with doing("merging partial results"):
        gathered = comm.all_gather(mine, [tuple(mine.shape)] * comm.size)
    heads = []
    for member in range(ulysses):
        merged = empty_partial(partial.out)
        for packed in gathered[member::ulysses]:
            merge_(merged, slice(None), _unpack(packed))
        heads.append(merged.out)
    return torch.cat(heads, 2)


def _merge_packed(parts: Sequence[Float[Tensor, "b s h packed"]]) -> Partial:
    """Merge packed partials of the same rows at once, which has less overhead than `merge_` one after another."""
    stacked = torch.stack(list(parts))
    out, lse = stacked[..., :-1], stacked[..., -1]
    unseen, total = lse == -torch.inf, lse.logsumexp(0)
    share = torch.exp(lse - total).masked_fill(unseen, 0.0)
    # A weight of 0 times NaN, which some kernels leave in rows without keys, would be NaN.
    return Partial((out.masked_fill(unseen.unsqueeze(-1), 0.0) * share.unsqueeze(-1)).sum(0), total)


def scatter_merge(
    partial: Partial,
    comm: Comm,
    ulysses: int,
    heads: Sequence[range],
    sinks: Float[Tensor, " hq"] | None = None,
) -> Float[Tensor, "b sq share d"]:
    """Merge all ranks' partials of the same query rows, each rank some of the heads, with one all-to-all.

    As in `gather_merge` every rank passes its ``partial`` [b s hq/U d] of the same rows.  Rank r gets the attention
    output [b s len(heads[r]) d] of the query heads ``heads[r]``; ``sinks`` are the logits of all heads' attention sinks
    (see `partial.sink`).  Bytes sent per rank: d values and one log-sum-exp per row and head of the other ranks that it
    attended with, in the accumulation dtype.
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
