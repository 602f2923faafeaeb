"""`DistComm`, a `Comm` over torch.distributed (gloo, NCCL), with sockets for small tensors between CPUs."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import default_pg_timeout

from longctx.parallel.comm import LostPeer, Pending, Shape, Traffic
from longctx.parallel.sockets import PeerSockets, connect_peers
from longctx.shapes import AnyShape

PeerTensor = tuple[int, AnyShape]  # (the peer's rank in the group, the tensor to send or to receive)
_MAX_PADDED = 65_536  # elements up to which an all-gather pads tensors of different lengths
_MAX_COPIED = 16_384  # elements up to which an all-gather between CPUs is an all-to-all of copies
_MAX_DIRECT = 262_144  # the same if the copies travel over sockets


@dataclass(frozen=True)
class _InFlight:
    peers: str
    works: Sequence[dist.Work]
    received: tuple[AnyShape, ...]
    # The backend reads the sent tensors until the work is done.  This reference keeps their memory alive.
    sent: tuple[AnyShape, ...]

    def wait(self) -> tuple[AnyShape, ...]:
        with _raise_lost_peer(self.peers):
            for work in self.works:
                work.wait()
        return self.received


@contextmanager
def _raise_lost_peer(peers: str) -> Iterator[None]:
    """Turn the error for a broken or timed-out connection into a `LostPeer` that names ``peers``."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch.distributed's, and those of sockets
        silent = " (no answer within run.timeout_minutes)" if "imed out" in str(error) else ""
        raise LostPeer(f"lost {peers}{silent}") from error


@contextmanager
def name_failed_collectives() -> Iterator[None]:
    """Turn the failure of a torch.distributed collective inside the block into a `LostPeer`.

    Use it for collectives that other code calls, such as megatron-core's.  The message names the collective and its
    ranks.  Both come from the traceback: from the innermost torch.distributed frame with a ``group``.
    """
    try:
        yield
    except RuntimeError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "group" in frame.f_locals]
        collectives = [frame for frame in frames if frame.f_code.co_filename == dist.distributed_c10d.__file__]
        if not collectives:
            raise
        ranks = ", ".join(map(str, dist.get_process_group_ranks(collectives[-1].f_locals["group"])))
        raise LostPeer(f"{collectives[-1].f_code.co_name} of ranks {ranks} failed: {error}") from error


class DistComm:
    """A `Comm` over a torch.distributed process group: gloo between CPUs, NCCL between GPUs.

    Small tensors of CPUs travel over `PeerSockets` if all ranks of the group are on one machine.  The first small
    exchange connects them.  ``timeout_s`` is the longest wait for a rank in such an exchange.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float = default_pg_timeout.total_seconds()) -> None:
        self.group, self._timeout_s = group, timeout_s
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.traffic = Traffic()
        self._names: dict[frozenset[int], str] = {}  # kept, since finding them takes longer than a small exchange

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Start sending ``mine`` to the next rank and receiving the previous rank's tensors, which have ``shapes``."""
        sent = tuple(x.contiguous() for x in mine)
        received = tuple(x.new_empty(shape) for x, shape in zip(mine, shapes, strict=True))
        self.traffic.count("shift", sent)
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        receives = [(previous, x) for x in received if x.numel()]
        sends = [(following, x) for x in sent if x.numel()]
        return _InFlight(*self._start(receives, sends), received, sent)

    def _start(self, receives: Sequence[PeerTensor], sends: Sequence[PeerTensor]) -> tuple[str, Sequence[dist.Work]]:
        """Start the messages ``receives`` and ``sends``.

        Return the names of the peers for error messages, and the `dist.Work` objects to wait for.
        """
        names = self._world_ranks({peer for peer, _ in (*receives, *sends)})
        with _raise_lost_peer(names):
            return names, self._exchange(receives, sends)

    def _world_ranks(self, members: set[int]) -> str:
        """Name group members by their world ranks, which are the ones that users see: "rank 2 or 5"."""
        known, key = self._names, frozenset(members)
        if key not in known:
            ranks = sorted(dist.get_global_rank(self.group, member) for member in members)
            known[key] = f"rank {' or '.join(map(str, ranks))}"
        return known[key]

    @cached_property
    def _other_ranks(self) -> str:
        return self._world_ranks(set(range(self.size)) - {self.rank})

    # The calls to torch.distributed.  `recording.RecordingComm` records them instead.

    def _exchange(self, receives: Sequence[PeerTensor], sends: Sequence[PeerTensor]) -> Sequence[dist.Work]:
        """Start one batch of point-to-point messages; without messages, call nothing."""
        ops = [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for peer, x in receives]
        ops += [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for peer, x in sends]
        return dist.batch_isend_irecv(ops) if ops else []

    def _exchange_packed(self, received: AnyShape, sizes: list[int], packed: AnyShape, sizes_sent: list[int]) -> None:
        dist.all_to_all_single(received, packed, sizes, sizes_sent, group=self.group)

    def _gather_equal(self, received: list[AnyShape], mine: AnyShape) -> None:
        dist.all_gather(received, mine, group=self.group)

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Send ``parts[i]`` to rank i; return the tensors in rank order, the one from rank i with ``shapes[i]``."""
        others = [other for other in range(self.size) if other != self.rank]
        self.traffic.count("all_to_all", [parts[other] for other in others])
        if small and parts[0].device.type == "cpu" and self._sockets:
            return self._all_to_all_direct(self._sockets, parts, shapes)
        if small:
            return self._all_to_all_packed(parts, shapes)
        # Point-to-point messages, not the backend's all-to-all: gloo's takes twice as long for uneven parts on a
        # slow link, and both backends need the parts packed into one tensor first.
        sent = {other: parts[other].contiguous() for other in others if parts[other].numel()}
        received = [x.new_empty(shape) for x, shape in zip(parts, shapes, strict=True)]
        received[self.rank] = parts[self.rank]
        receives = [(other, received[other]) for other in others if received[other].numel()]
        started = self._start(receives, list(sent.items()))
        return list(_InFlight(*started, tuple(received), tuple(sent.values())).wait())

    @cached_property
    def _sockets(self) -> PeerSockets | None:
        def all_gather(mine: object) -> list[object]:
            objects: list[object] = [None] * self.size
            dist.all_gather_object(objects, mine, group=self.group)
            return objects

        with _raise_lost_peer(self._other_ranks):
            return connect_peers(self.rank, self.size, all_gather, self._timeout_s)

    def close(self) -> None:
        """Close the sockets, if there are any, without waiting for other ranks; the process group stays open."""
        if sockets := vars(self).pop("_sockets", None):
            sockets.close()

    def _all_to_all_direct(
        self, sockets: PeerSockets, parts: Sequence[AnyShape], shapes: Sequence[Shape]
    ) -> list[AnyShape]:
        """Send the parts over ``sockets``, each from its own memory into the receiver's tensor."""
        sent = {i: x.contiguous() for i, x in enumerate(parts) if i != self.rank}
        received = {i: parts[i].new_empty(shapes[i]) for i in sent}
        with _raise_lost_peer(self._other_ranks):
            sockets.exchange(sent, received)
        return [parts[self.rank] if i == self.rank else received[i] for i in range(self.size)]

    def _all_to_all_packed(self, parts: Sequence[AnyShape], shapes: Sequence[Shape]) -> list[AnyShape]:
        """Pack the parts into one tensor for the backend's all-to-all: less latency than a message per rank."""
        packed, sizes = torch.cat([x.flatten() for x in parts]), [prod(shape) for shape in shapes]
        received = packed.new_empty(sum(sizes))
        with _raise_lost_peer(self._other_ranks):
            self._exchange_packed(received, sizes, packed, [x.numel() for x in parts])
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Return every rank's ``mine``, in rank order; ``shapes[i]`` is the shape of rank i's tensor."""
        # The backend's all-gather has less latency than a message per rank, but needs tensors of equal length.
        # Small tensors are padded.  Large tensors of different lengths are sent to each rank, without padding.
        # Between CPUs, an all-to-all has at most half the latency of gloo's all-gather, and needs no padding.
        sizes = [prod(shape) for shape in shapes]
        largest, even = max(sizes), len(set(sizes)) == 1
        copied = largest * self.size
        if 0 < copied <= _MAX_DIRECT and mine.device.type == "cpu" and (copied <= _MAX_COPIED or self._sockets):
            return self.all_to_all([mine] * self.size, shapes, small=True)
        if not largest or not (even or largest <= _MAX_PADDED):
            return self.all_to_all([mine] * self.size, shapes)
        self.traffic.count("all_to_all", [mine] * (self.size - 1))
        padded = mine.flatten() if even else F.pad(mine.flatten(), (0, largest - mine.numel()))
        received = [torch.empty_like(padded) for _ in shapes]
        with _raise_lost_peer(self._other_ranks):
            self._gather_equal(received, padded)
        return [x[:size].view(shape) for x, size, shape in zip(received, sizes, shapes, strict=True)]


ALLOCATORS = (DistComm.shift, DistComm.all_to_all, DistComm.all_gather)  # for a `MemoryMeter`: messages
