"""Merge the ranks' partial results of the same query rows in one exchange: all heads on every rank, or some on each."""

from collections.abc import Sequence

import torch

from longctx.attention.partial import Partial, empty_partial, merge, merge_, merge_all, sink
from longctx.parallel.comm import Comm, doing
from longctx.shapes import Float, Queries, Tensor


def pack(partial: Partial) -> Tensor:
    """Pack ``out`` [b s h d] and ``lse`` [b s h] into one tensor [b s h d+1], which travels as one message."""
    return torch.cat([partial.out, partial.lse.unsqueeze(-1)], -1)


def unpack(packed: Tensor) -> Partial:
    """Return the partial that `pack` has packed."""
    return Partial(packed[..., :-1], packed[..., -1])


def gather_merge(partial: Partial, comm: Comm, ulysses: int, sinks: Float[Tensor, " hq"] | None = None) -> Queries:
    """Merge all ranks' partials of the same query rows with one all-gather (tree decoding).

    Every rank passes its ``partial`` [b s hq/U d] of the same rows, where U = ``ulysses``.  Every rank gets the
    attention output [b s hq d], in the partial's dtype.  In ``comm``, rank = ring rank * U + ulysses rank: Ulysses
    ranks hold different heads, ring ranks different keys.  ``sinks`` are the sink scores of all hq heads; they are
    merged once, after the keys of all ranks.  All ranks merge the same partials in the same order.  Bytes sent per
    rank: d values and one log-sum-exp per row and head, in the accumulation dtype, to each other rank.
    """
    if comm.size == 1:
        return (partial if sinks is None else merge(partial, sink(sinks, partial))).out
    mine = pack(partial)
    with doing("merging partial results"):
        gathered = comm.all_gather(mine, [tuple(mine.shape)] * comm.size)
    heads = []
    for member in range(ulysses):
        merged = empty_partial(partial.out)
        for packed in gathered[member::ulysses]:
            merge_(merged, slice(None), unpack(packed))
        if sinks is not None:
            merge_(merged, slice(None), sink(sinks.chunk(ulysses)[member], merged))
        heads.append(merged.out)
    return torch.cat(heads, 2)


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
        """Return the heads that rank ``owner`` merges, as a slice of the heads of Ulysses rank ``of_member``."""
        begin = max(0, heads[owner].start - of_member * width)
        return slice(begin, max(begin, min(width, heads[owner].stop - of_member * width)))

    mine = pack(partial)
    shares = [common(comm.rank, rank % ulysses) for rank in range(comm.size)]
    shapes = [(*mine.shape[:2], share.stop - share.start, mine.shape[3]) for share in shares]
    with doing("merging partial results"):
        parts = comm.all_to_all([mine[:, :, common(owner, member)] for owner in range(comm.size)], shapes, small=True)
    merged = merge_all([unpack(torch.cat(parts[i : i + ulysses], 2)) for i in range(0, comm.size, ulysses)])
    if sinks is not None:
        owned = heads[comm.rank]
        merge_(merged, slice(None), sink(sinks[owned.start : owned.stop], merged))
    return merged.out
