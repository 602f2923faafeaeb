"""Ranks as threads of one process, for unit tests and debuggers."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from longctx.parallel.comm import Comm, Pending, Shape, SingleRankComm, Traffic
from longctx.shapes import AnyShape

Result = TypeVar("Result")
_TIMEOUT_S = 60  # a rank that waits longer waits for a rank that has failed


class ThreadWorld:
    """The message queues, one from each rank to each other, through which ranks that are threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        ranks = range(size)
        self._boxes = {(a, b): queue.SimpleQueue[tuple[AnyShape, ...]]() for a in ranks for b in ranks}

    def group(self, rank: int, members: Sequence[int] | None = None) -> Comm:
        """Return the group of ``members`` (None: all ranks), seen from world rank ``rank``."""
        members = range(self.size) if members is None else members
        return ThreadComm(self, rank, tuple(members)) if len(members) > 1 else SingleRankComm()

    def send(self, source: int, to: int, tensors: tuple[AnyShape, ...]) -> None:
        """Queue copies of ``tensors`` from rank ``source`` for rank ``to``."""
        self._boxes[source, to].put(tuple(x.clone() for x in tensors))

    def receive(self, source: int, to: int) -> tuple[AnyShape, ...]:
        """Wait for the next tensors from ``source`` to ``to``.  Raises `queue.Empty` after 60 seconds."""
        return self._boxes[source, to].get(timeout=_TIMEOUT_S)


@dataclass(frozen=True)
class _ThreadPending:
    world: ThreadWorld
    source: int
    to: int
    shapes: tuple[Shape, ...]

    def wait(self) -> tuple[AnyShape, ...]:
        """Wait for the tensors, which must have the expected shapes."""
        tensors = self.world.receive(self.source, self.to)
        assert tuple(tuple(x.shape) for x in tensors) == self.shapes, "the receiver expected other shapes"
        return tensors


class ThreadComm:
    """A `Comm` between threads of one process; each thread is a rank."""

    def __init__(self, world: ThreadWorld, rank: int, members: tuple[int, ...]) -> None:
        self.world, self.members = world, members
        self.rank, self.size = members.index(rank), len(members)
        self.traffic = Traffic()

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Start sending ``mine`` to the next rank and receiving the previous rank's tensors, which have ``shapes``."""
        self.traffic.count("shift", mine)
        self.world.send(self.members[self.rank], self.members[(self.rank + 1) % self.size], mine)
        return self._pending(self.rank - 1, tuple(map(tuple, shapes)))

    def _pending(self, source: int, shapes: tuple[Shape, ...]) -> _ThreadPending:
        return _ThreadPending(self.world, self.members[source % self.size], self.members[self.rank], shapes)

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Send ``parts[i]`` to rank i; return the tensors in rank order, the one from rank i with ``shapes[i]``.

        ``small`` has no effect: threads pass small and large tensors alike.
        """
        del small  # a queue has one speed
        self.traffic.count("all_to_all", [x for i, x in enumerate(parts) if i != self.rank])
        for member, part in zip(self.members, parts, strict=True):
            self.world.send(self.members[self.rank], member, (part,))
        return [self._pending(i, (tuple(shape),)).wait()[0] for i, shape in enumerate(shapes)]

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Return every rank's ``mine``, in rank order; ``shapes[i]`` is the shape of rank i's tensor."""
        return self.all_to_all([mine] * self.size, shapes)


def run_threads(size: int, rank_main: Callable[[ThreadWorld, int], Result]) -> list[Result]:
    """Run ``rank_main(world, rank)`` on ``size`` threads and return the results in rank order.

    Raises the error of a rank that failed; `queue.Empty` only if no rank has another error.
    """
    world = ThreadWorld(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_main, world, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    # Ranks that waited for a failed rank raise queue.Empty, which does not say why: these errors come last.
    for error in sorted(errors, key=lambda error: isinstance(error, queue.Empty)):
        raise error
    return [future.result() for future in futures]
