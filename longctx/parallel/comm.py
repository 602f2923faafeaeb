"""A group of ranks is a value: `Comm`, on torch.distributed (gloo, NCCL) or on nobody at all.

Shapes are not exchanged: every rank knows every layout, so the receiver says what will come.  Tensors of
zero elements are not sent.  What is sent to others is counted in ``traffic``.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from longctx.shapes import Tensor

Shape = tuple[int, ...]


class LostPeer(ConnectionError):
    """Another rank of the group has gone; says which, and what was being done (`doing`) when it was missed."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Add ``what`` to the words of a `LostPeer` that is raised inside."""
    try:
        yield
    except LostPeer as lost:
        raise LostPeer(f"{lost}, {what}") from lost


@dataclass
class Traffic:
    """Bytes and messages that a rank has sent to other ranks, by operation.

    ``purposes`` counts the bytes that were sent inside `counted_as` once more, by its argument.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    purposes: dict[str, int] = field(default_factory=dict)
    _purpose: str | None = field(default=None, repr=False, compare=False)

    @contextmanager
    def counted_as(self, purpose: str) -> Iterator[None]:
        """Count the bytes that are sent inside the block under ``purpose`` too."""
        self._purpose, before = purpose, self._purpose
        try:
            yield
        finally:
            self._purpose = before

    def count(self, operation: str, sent: Sequence[Tensor]) -> None:
        sizes = [x.numel() * x.element_size() for x in sent if x.numel()]
        self.bytes[operation] = self.bytes.get(operation, 0) + sum(sizes)
        self.messages[operation] = self.messages.get(operation, 0) + len(sizes)
        if self._purpose is not None:
            self.purposes[self._purpose] = self.purposes.get(self._purpose, 0) + sum(sizes)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@runtime_checkable
class Pending(Protocol):
    """Tensors on their way; what travels is read-only until ``wait`` has returned."""

    def wait(self) -> tuple[Tensor, ...]: ...


@runtime_checkable
class Comm(Protocol):
    """A group of ranks, seen from one of them."""

    rank: int
    size: int
    traffic: Traffic

    def shift(self, *mine: Tensor, coming: Sequence[Shape]) -> Pending:
        """Send ``mine`` to the next rank; the previous rank's tensors, of shapes ``coming``, come in."""
        ...

    def all_to_all(self, parts: Sequence[Tensor], coming: Sequence[Shape]) -> list[Tensor]:
        """Send ``parts[i]`` to rank i; entry i of the answer is what rank i sent here."""
        ...

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Everybody's tensor; ``shapes[i]`` is that of rank i."""
        ...


@dataclass(frozen=True)
class CompletedPending:
    """A `Pending` whose tensors are here."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


@dataclass
class SingleRankComm:
    """A group of one, which has nobody to talk to."""

    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def shift(self, *mine: Tensor, coming: Sequence[Shape]) -> Pending:
        raise AssertionError("a ring of one communicates nothing")

    def all_to_all(self, parts: Sequence[Tensor], coming: Sequence[Shape]) -> list[Tensor]:
        return list(parts)

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [mine]


@dataclass(frozen=True)
class _InFlight:
    works: Sequence[dist.Work]
    coming: tuple[Tensor, ...]
    # The backend reads these until it is done: dropping them early would free their memory under it.
    leaving: tuple[Tensor, ...]
    neighbours: str

    def wait(self) -> tuple[Tensor, ...]:
        with _noticing(self.neighbours):
            for work in self.works:
                work.wait()
        return self.coming


@contextmanager
def _noticing(peers: str) -> Iterator[None]:
    """What torch.distributed raises when a connection breaks, or stays silent, as a `LostPeer` among ``peers``."""
    try:
        yield
    except RuntimeError as error:
        silent = " (silent for longer than timeout_minutes allows)" if "imed out" in str(error) else ""
        raise LostPeer(f"lost {peers}{silent}") from error


@contextmanager
def naming_collectives() -> Iterator[None]:
    """Collectives of others' code (megatron-core's) that fail, as a `LostPeer` that says which, and of which ranks."""
    try:
        yield
    except RuntimeError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "group" in frame.f_locals]
        called = [frame for frame in frames if frame.f_code.co_filename == dist.distributed_c10d.__file__]
        if not called:
            raise
        ranks = dist.get_process_group_ranks(called[-1].f_locals["group"])
        who = ", ".join(map(str, ranks))
        raise LostPeer(f"{called[-1].f_code.co_name} of ranks {who} failed: {error}") from error


class DistComm:
    """A `Comm` over a torch.distributed process group: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.traffic = Traffic()

    def shift(self, *mine: Tensor, coming: Sequence[Shape]) -> Pending:
        leaving = tuple(x.contiguous() for x in mine)
        arriving = tuple(x.new_empty(shape) for x, shape in zip(mine, coming, strict=True))
        self.traffic.count("shift", leaving)
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [self._p2p(dist.irecv, x, previous) for x in arriving if x.numel()]
        ops += [self._p2p(dist.isend, x, following) for x in leaving if x.numel()]
        neighbours = self._named({previous, following})
        with _noticing(neighbours):
            works = dist.batch_isend_irecv(ops) if ops else []
        return _InFlight(works, arriving, leaving, neighbours)

    def _named(self, members: set[int]) -> str:
        """Members as the ranks that the user knows: those of the world."""
        ranks = sorted(dist.get_global_rank(self.group, member) for member in members)
        return f"rank {' or '.join(map(str, ranks))}"

    def _p2p(self, op: Callable[..., Any], x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, x, group=self.group, group_peer=peer)

    def all_to_all(self, parts: Sequence[Tensor], coming: Sequence[Shape]) -> list[Tensor]:
        # Messages from rank to rank, in place of the backend's own: gloo's all-to-all of uneven parts takes twice as
        # long on a slow link, and both would have the parts packed into one tensor first.
        others = [other for other in range(self.size) if other != self.rank]
        leaving = {other: parts[other].contiguous() for other in others if parts[other].numel()}
        self.traffic.count("all_to_all", list(leaving.values()))
        arriving = [x.new_empty(shape) for x, shape in zip(parts, coming, strict=True)]
        arriving[self.rank] = parts[self.rank]
        ops = [self._p2p(dist.irecv, arriving[other], other) for other in others if arriving[other].numel()]
        ops += [self._p2p(dist.isend, x, other) for other, x in leaving.items()]
        neighbours = self._named(set(others))
        with _noticing(neighbours):
            works = dist.batch_isend_irecv(ops) if ops else []
        return list(_InFlight(works, tuple(arriving), tuple(leaving.values()), neighbours).wait())

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        # gloo's own all-gather refuses parts of different length; the bytes are the same this way.
        return self.all_to_all([mine] * self.size, shapes)
