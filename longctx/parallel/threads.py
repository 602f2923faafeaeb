"""Ranks as threads of one process: the whole of context parallelism under a debugger, and in unit tests."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from longctx.parallel.comm import Comm, Pending, Shape, SingleRankComm, Traffic
from longctx.shapes import Tensor

Result = TypeVar("Result")
_SECONDS = 60  # a rank that waits longer than this waits for a rank that has failed


class ThreadWorld:
    """Mailboxes between the threads of one world."""

    def __init__(self, size: int) -> None:
        self.size = size
        ranks = range(size)
        self._boxes = {(a, b): queue.SimpleQueue[tuple[Tensor, ...]]() for a in ranks for b in ranks}

    def group(self, rank: int, members: Sequence[int] | None = None) -> Comm:
        """The group of ``members`` (all, if not given), seen from the world's rank ``rank``."""
        members = range(self.size) if members is None else members
        return ThreadComm(self, rank, tuple(members)) if len(members) > 1 else SingleRankComm()

    def send(self, source: int, to: int, tensors: tuple[Tensor, ...]) -> None:
        self._boxes[source, to].put(tuple(x.clone() for x in tensors))

    def receive(self, source: int, to: int) -> tuple[Tensor, ...]:
        return self._boxes[source, to].get(timeout=_SECONDS)


@dataclass(frozen=True)
class _Mail:
    world: ThreadWorld
    source: int
    to: int
    coming: tuple[Shape, ...]

    def wait(self) -> tuple[Tensor, ...]:
        tensors = self.world.receive(self.source, self.to)
        assert tuple(tuple(x.shape) for x in tensors) == self.coming, "the receiver expected other shapes"
        return tensors


class ThreadComm:
    """A `Comm` between threads."""

    def __init__(self, world: ThreadWorld, rank: int, members: tuple[int, ...]) -> None:
        self.world, self.members = world, members
        self.rank, self.size = members.index(rank), len(members)
        self.traffic = Traffic()

    def shift(self, *mine: Tensor, coming: Sequence[Shape]) -> Pending:
        self.traffic.count("shift", mine)
        self.world.send(self.members[self.rank], self.members[(self.rank + 1) % self.size], mine)
        return self._mail(self.rank - 1, tuple(map(tuple, coming)))

    def _mail(self, source: int, coming: tuple[Shape, ...]) -> _Mail:
        return _Mail(self.world, self.members[source % self.size], self.members[self.rank], coming)

    def all_to_all(self, parts: Sequence[Tensor], coming: Sequence[Shape]) -> list[Tensor]:
        self.traffic.count("all_to_all", [x for i, x in enumerate(parts) if i != self.rank])
        for member, part in zip(self.members, parts, strict=True):
            self.world.send(self.members[self.rank], member, (part,))
        return [self._mail(i, (tuple(shape),)).wait()[0] for i, shape in enumerate(coming)]

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return self.all_to_all([mine] * self.size, shapes)


def run_threads(size: int, rank_main: Callable[[ThreadWorld, int], Result]) -> list[Result]:
    """What ``rank_main(world, rank)`` gives on each of ``size`` threads."""
    world = ThreadWorld(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_main, world, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    # Those who waited for a rank that failed say only that nothing came.
    for error in sorted(errors, key=lambda error: isinstance(error, queue.Empty)):
        raise error
    return [future.result() for future in futures]
