"""`Comm`, a group of ranks as seen from one of them: the interface, and a group of a single rank.

The receiver states the shapes that will arrive (ARCHITECTURE.md says why).  Tensors of zero elements are not sent.
``traffic`` counts what a rank sends to other ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from longctx.shapes import AnyShape, Float, Tensor

Shape = tuple[int, ...]


class LostPeer(ConnectionError):
    """A rank of the group ended or stopped answering.

    The message names the ranks that this rank waited for, of which one is lost, and what this rank was `doing` when it
    noticed.
    """


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Append ``what`` to the message of a `LostPeer` that is raised inside the block."""
    try:
        yield
    except LostPeer as lost:
        raise LostPeer(f"{lost}, {what}") from lost


@dataclass
class Traffic:
    """Bytes and messages that a rank has sent to other ranks, by operation: "shift" or "all_to_all".

    All-gathers count as "all_to_all".  ``purposes`` holds the bytes sent inside `counted_as`, by purpose; ``bytes``
    includes them too.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    purposes: dict[str, int] = field(default_factory=dict)
    _purpose: str | None = field(default=None, repr=False, compare=False)

    @contextmanager
    def counted_as(self, purpose: str) -> Iterator[None]:
        """Count the bytes that are sent inside the ``with`` block also under ``purpose``, besides their operation."""
        self._purpose, before = purpose, self._purpose
        try:
            yield
        finally:
            self._purpose = before

    def count(self, operation: str, sent: Sequence[AnyShape]) -> None:
        """Count the tensors ``sent`` to other ranks; an empty tensor counts as no message."""
        sizes = [x.numel() * x.element_size() for x in sent if x.numel()]
        self.bytes[operation] = self.bytes.get(operation, 0) + sum(sizes)
        self.messages[operation] = self.messages.get(operation, 0) + len(sizes)
        if self._purpose is not None:
            self.purposes[self._purpose] = self.purposes.get(self._purpose, 0) + sum(sizes)

    @property
    def total(self) -> int:
        """Bytes that the rank has sent to other ranks, over all operations."""
        return sum(self.bytes.values())


@runtime_checkable
class Pending(Protocol):
    """Tensors in flight.  Until ``wait`` has returned, do not write to the tensors that were sent."""

    def wait(self) -> tuple[AnyShape, ...]:
        """Wait for the received tensors and return them.  Raises `LostPeer` if a neighbour has gone."""
        ...


@runtime_checkable
class Comm(Protocol):
    """A group of ranks, seen from one of them: ``rank`` of ``size``.  All members make the same calls in order.

    Results of `all_to_all` and `all_gather` may share memory with this rank's own tensors.
    """

    rank: int
    size: int
    traffic: Traffic

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Start sending ``mine`` to the next rank and receiving the previous rank's tensors, which have ``shapes``.

        After the last rank comes rank 0.  All ranks send equally many tensors, of the same dtypes in order.  Raises
        `LostPeer` if a neighbour has gone.
        """
        ...

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Send ``parts[i]`` to rank i; return the tensors in rank order, the one from rank i with ``shapes[i]``.

        ``small`` says that latency matters more than bandwidth; all ranks must pass the same value.

        Raises `LostPeer` if a rank is gone.
        """
        ...

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Return every rank's ``mine``, in rank order; ``shapes[i]`` is the shape of rank i's tensor.

        Raises `LostPeer` if a rank has gone.
        """
        ...


@dataclass(frozen=True)
class CompletedPending:
    """A `Pending` whose tensors have already arrived."""

    tensors: tuple[AnyShape, ...]

    def wait(self) -> tuple[AnyShape, ...]:
        """Return the tensors at once."""
        return self.tensors


@dataclass
class SingleRankComm:
    """A group of one rank, which sends nothing."""

    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Raise AssertionError: a ring of one rank has no hops."""
        raise AssertionError("a ring of one communicates nothing")

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Return ``parts``, a list of the rank's own part only."""
        return list(parts)

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Return a list of one: the rank's own tensor."""
        return [mine]


def sum_over_ranks(comm: Comm, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the sum of every rank's ``x``, all of one shape, in the dtype of ``x``.

    It takes one all-gather, so it is for small tensors, for which latency dominates.  Every rank adds in rank order, in
    float32 or a more precise dtype, so all ranks get the same bits.  A group of one rank gets ``x`` itself.
    """
    if comm.size == 1:
        return x
    parts = comm.all_gather(x, [tuple(x.shape)] * comm.size)
    return torch.stack(parts).sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def gather_bytes(world: Comm, data: bytes, device: torch.device) -> list[bytes]:
    """Return the ``data`` of every rank of ``world``, in rank order; all ranks must call this.

    ``device`` is where the tensors that are sent are made.
    """
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    sizes = world.all_gather(torch.tensor([len(data)], device=device), [(1,)] * world.size)
    parts = world.all_gather(own.to(device), [(int(size),) for size in sizes])
    return [bytes(part.tolist()) for part in parts]
