"""The ring: every rank's tensors in turn, and what is computed while the next are on their way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from longctx.attention.kernel import Gradients, Kernel, attend_tiles, tile_gradients
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial, empty_partial, merge_
from longctx.attention.tiles import Tile, visible_tiles
from longctx.parallel.comm import Comm, Shape, doing
from longctx.shapes import Keys, Queries, Tensor


@dataclass(frozen=True)
class Ring:
    """A group of ranks, which rows of the queries and of the keys each of them holds, and which of them meet."""

    comm: Comm
    queries: Layout
    keys: Layout
    mask: Mask = CAUSAL
    _tiles: dict[tuple[int, int], tuple[Tile, ...]] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, q_rank: int, k_rank: int) -> tuple[Tile, ...]:
        """Where the queries of one rank meet the keys of another; worked out once, however many layers ask."""
        pair = q_rank, k_rank
        if pair not in self._tiles:
            self._tiles[pair] = visible_tiles(self.queries.ranks[q_rank], self.keys.ranks[k_rank], self.mask)
        return self._tiles[pair]

    @cached_property
    def hops_of_keys(self) -> int:
        """Hops after which no rank needs the keys that would come next: N - 1, or fewer under a window."""
        return self._hops(self.tiles)

    @cached_property
    def hops_of_queries(self) -> int:
        """Hops after which no rank has keys for the queries that would come next."""
        return self._hops(lambda rank, owner: self.tiles(owner, rank))

    def _hops(self, needed: Callable[[int, int], tuple[Tile, ...]]) -> int:
        size = self.comm.size
        far = (hops for hops in range(size - 1, 0, -1) for rank in range(size) if needed(rank, (rank - hops) % size))
        return next(far, 0)


Strategy = Callable[[Queries, Keys, Keys, Ring, Kernel], Partial]


def _with_rows(x: Tensor, rows: int) -> Shape:
    return (x.shape[0], rows, *x.shape[2:])


def rotate(
    comm: Comm, layout: Layout, *mine: Tensor, hops: int | None = None
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Every rank's tensors in turn, with their owner, our own first; the next are on their way while we work.

    Owners hold as many rows (dim 1) as ``layout`` says.  After ``hops``, the same on every rank, it ends.  Two
    buffers, what is held and what is coming: drop what was yielded (``del``) before asking for more, or it lives on
    as a third.
    """
    held = mine
    hops = comm.size - 1 if hops is None else hops
    for step in range(hops):
        previous = (comm.rank - step - 1) % comm.size
        shapes = [_with_rows(x, layout.rows(previous)) for x in mine]
        hop = f"hop {step + 1} of {hops} of the ring"
        with doing(hop):
            coming = comm.shift(*held, coming=shapes)
        yield (comm.rank - step) % comm.size, held
        with doing(hop):
            held = coming.wait()
        del coming  # it keeps what has left alive, too
    yield (comm.rank - hops) % comm.size, held


def pass_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Queries stay, keys and values go round (arXiv 2411.01783, Alg. 2).

    Bytes sent per rank: keys and values of every rank but the next one, which are the ones that pass by; under a
    window those of as many as are needed.
    """
    seen = empty_partial(q)
    for owner, (k_o, v_o) in rotate(ring.comm, ring.keys, k, v, hops=ring.hops_of_keys):
        attend_tiles(seen, q, k_o, v_o, ring.tiles(ring.comm.rank, owner), kernel)
        del k_o, v_o
    return seen


def pass_q(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Keys and values stay, queries go round; their answers come home in one exchange (Alg. 3).

    Bytes sent per rank: queries of every rank but the next one, and the answers to all but its own, each a
    row of d values and its log-sum-exp per head, in float32.  Who has no key for them sends no answer.
    """
    comm = ring.comm
    whole = empty_partial(q)
    none: Shape = (q.shape[0], 0, q.shape[2], q.shape[3] + 1)
    answers = [whole.out.new_empty(none)] * comm.size
    for owner, (q_o,) in rotate(comm, ring.queries, q, hops=ring.hops_of_queries):
        if tiles := ring.tiles(owner, comm.rank):
            seen = empty_partial(q_o)
            attend_tiles(seen, q_o, k, v, tiles, kernel)
            answers[owner] = torch.cat([seen.out, seen.lse.unsqueeze(-1)], -1)
        del q_o
    coming = [_with_rows(answers[0], q.shape[1] if ring.tiles(comm.rank, other) else 0) for other in range(comm.size)]
    with doing("answers coming home"):
        answers = comm.all_to_all(answers, coming)
    for answer in answers:
        merge_(whole, slice(0, answer.shape[1]), Partial(answer[..., :-1], answer[..., -1]))
    return whole


def all_gather_kv(q: Queries, k: Keys, v: Keys, ring: Ring, kernel: Kernel) -> Partial:
    """Queries stay, all keys and values come at once (Llama 3's training, 2411.01783 section 3.5.2).

    The bytes of `pass_kv` and one exchange instead of N - 1 hops, but nothing to compute while they travel,
    and every rank's block is alive.  Bytes sent per rank: its own keys and values, to each of the others.
    """
    comm, seen = ring.comm, empty_partial(q)
    both = torch.cat([k, v], -1)
    shapes = [_with_rows(both, ring.keys.rows(owner)) for owner in range(comm.size)]
    with doing("gathering keys and values"):
        gathered = comm.all_gather(both, shapes)
    for owner, block in enumerate(gathered):
        k_o, v_o = block.chunk(2, -1)
        attend_tiles(seen, q, k_o, v_o, ring.tiles(comm.rank, owner), kernel)
    return seen


def gather_merge(seen: Partial, comm: Comm, ulysses: int) -> Queries:
    """The whole answer of queries that every rank holds, from each rank's ``seen`` [b s hq/U d], in one exchange.

    Rank = ring rank * ``ulysses`` + ulysses rank; the ulysses ranks have seen other heads, the ring ranks other
    keys.  Every rank merges the same parts in the same order.  Bytes sent per rank: a row of d values and its
    log-sum-exp per head, in float32, to each of the others.
    """
    mine = torch.cat([seen.out, seen.lse.unsqueeze(-1)], -1)
    with doing("answers meeting"):
        parts = comm.all_gather(mine, [tuple(mine.shape)] * comm.size)
    heads = []
    for member in range(ulysses):
        whole = empty_partial(seen.out)
        for part in parts[member::ulysses]:
            merge_(whole, slice(None), Partial(part[..., :-1], part[..., -1]))
        heads.append(whole.out)
    return torch.cat(heads, 2)


def ring_gradients(
    dout: Queries, q: Queries, k: Keys, v: Keys, whole: Partial, ring: Ring, kernel: Kernel
) -> Gradients:
    """(dq, dk, dv) in the accumulation dtype, whichever of the strategies made ``whole``.

    Keys and values go round again, and the sums of their gradients follow one step behind, so that they
    arrive at home complete after the last step.
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
            sums = comm.shift(dk, dv, coming=[_with_rows(k, following)] * 2)
    if sums:
        dk, dv = sums.wait()
    return dq, dk, dv
