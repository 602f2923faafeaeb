"""Record what every rank of a pass sends and receives, in one process and without data, to prove its schedule.

The real algorithms run once for each rank, on tensors of the device meta, over a `RecordingComm`.  The control flow of
a pass does not depend on data, and a receiver knows the shapes that arrive, so no rank waits for another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial, accumulation_dtype, empty_partial
from longctx.config import Mesh
from longctx.parallel.comm import Comm, SingleRankComm, Traffic
from longctx.parallel.dist_comm import DistComm, PeerTensor
from longctx.parallel.hybrid import hybrid
from longctx.parallel.ring import Strategy
from longctx.parallel.schedule import EXCHANGE, Group, Message, Operation, Schedule
from longctx.shapes import AnyShape, Tensor

META = torch.device("meta")


class RecordingComm(DistComm):
    """A `DistComm` that appends its calls to ``schedule`` and returns tensors of the stated shapes at once.

    ``rank`` is a world rank.  The tensors of other ranks are uninitialised.
    """

    def __init__(self, group: Group, rank: int, schedule: Schedule) -> None:
        self._group, self._schedule = group, schedule
        self.rank, self.size = group.ranks.index(rank), len(group.ranks)
        self.traffic = Traffic()

    def _record(self, name: str, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        messages = (
            tuple(Message(self._group.ranks[peer], x.numel(), x.dtype) for peer, x in each if x.numel())
            for each in (sends, receives)
        )
        self._schedule.append(Operation(name, self._group, *messages))

    def _others(self, tensors: Sequence[AnyShape]) -> list[PeerTensor]:
        return [(peer, x) for peer, x in enumerate(tensors) if peer != self.rank]

    def _world_ranks(self, members: set[int]) -> str:
        return ", ".join(str(self._group.ranks[member]) for member in sorted(members))

    _sockets = None  # small exchanges are recorded as the backend's

    def _exchange(self, receives: Sequence[PeerTensor], sends: Sequence[PeerTensor]) -> Sequence[dist.Work]:
        self._record(EXCHANGE, sends, receives)
        return []

    def _exchange_packed(self, received: AnyShape, sizes: list[int], packed: AnyShape, sizes_sent: list[int]) -> None:
        sends, receives = packed.split(sizes_sent), received.split(sizes)
        self._record("all_to_all", self._others(sends), self._others(receives))

    def _gather_equal(self, received: list[AnyShape], mine: AnyShape) -> None:
        self._record("all_gather", self._others([mine] * self.size), self._others(received))


@dataclass(frozen=True)
class RecordedGroups:
    """The groups of ranks that one rank of a mesh belongs to, as in `Runtime`, but recording instead of sending.

    ``rank`` is this rank's number in ``context``.
    """

    rank: int
    tp: Comm
    ulysses: Comm
    ring: Comm
    context: Comm
    tp_context: Comm


def record(mesh: Mesh, rank_main: Callable[[RecordedGroups], object]) -> list[Schedule]:
    """Run ``rank_main(groups)`` for each rank of ``mesh``, one after the other; return their schedules in rank order.

    The ranks are those of one pipeline stage and one data-parallel replica: tp x ulysses x ring.  Rank = context rank *
    tp size + tp rank.
    """
    schedules: list[Schedule] = [[] for _ in range(mesh.tp * mesh.context)]
    for rank, schedule in enumerate(schedules):
        rank_main(_groups_of(mesh, rank, schedule))
    return schedules


def _groups_of(mesh: Mesh, rank: int, schedule: Schedule) -> RecordedGroups:
    tp, ulysses, ring = mesh.tp, mesh.ulysses, mesh.ring
    context_rank, tp_rank = divmod(rank, tp)
    ring_rank, member = divmod(context_rank, ulysses)

    def comm(name: str, ranks: Sequence[int]) -> Comm:
        return RecordingComm(Group(name, tuple(ranks)), rank, schedule) if len(ranks) > 1 else SingleRankComm()

    def across(context_ranks: Sequence[int]) -> list[int]:
        return [tp_rank + tp * other for other in context_ranks]

    return RecordedGroups(
        context_rank,
        comm("tp", range(context_rank * tp, (context_rank + 1) * tp)),
        comm("ulysses", across(range(ring_rank * ulysses, (ring_rank + 1) * ulysses))),
        comm("ring", across(range(member, ring * ulysses, ulysses))),
        comm("context", across(range(ring * ulysses))),
        comm("tp_context", range(tp * ulysses * ring)),
    )


def _shapes_only_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    del k, v, causal
    return empty_partial(q)


def _shapes_only_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> Gradients:
    del dout, out, lse, causal
    return tuple(x.to(accumulation_dtype(x)) for x in (q, k, v))  # type: ignore[return-value]


SHAPES_ONLY = Kernel("shapes_only", _shapes_only_forward, _shapes_only_backward, devices=("meta", "cpu"))


def attention_schedules(
    mesh: Mesh,
    layout: Layout,
    strategy: Strategy,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mask: Mask = CAUSAL,
    dtype: torch.dtype = torch.float32,
    device: torch.device = META,
) -> list[Schedule]:
    """Record one layer's attention in a training step, forward and backward, on every rank of ``mesh``.

    ``layout`` shards the rows over ulysses x ring ranks; ``heads`` and ``kv_heads`` count one tensor-parallel rank's
    heads.  Recording small tensors is faster on the ``device`` cpu.  Raises ValueError as `over_heads` does.
    """

    def rank_main(groups: RecordedGroups) -> None:
        rows = layout.rows(groups.rank)
        q, k, v = (
            torch.empty(1, rows, h, head_dim, dtype=dtype, device=device, requires_grad=True)
            for h in (heads, kv_heads, kv_heads)
        )
        out = hybrid(groups.ulysses, groups.ring, layout, mask).attention(SHAPES_ONLY, strategy)(q, k, v)
        out.backward(torch.empty_like(out))

    return record(mesh, rank_main)
