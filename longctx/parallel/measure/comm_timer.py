"""How long a rank waits for others: a `Comm` that measures it, and changes nothing else.

What is on its way while a rank computes costs nothing; what it then still waits for is exposed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from longctx.parallel.comm import Comm, Pending, Shape, Traffic
from longctx.shapes import Tensor


@dataclass
class ExposedCommTimer:
    """Seconds that a rank has waited for others, by operation, in all the groups that count here (`TimedComm`).

    A GPU's stream waits, not the process that has queued its work: there the seconds between two events are
    counted, from when the stream is done with what was queued before until it goes on.
    """

    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def during(self, operation: str, device: torch.device) -> Iterator[None]:
        """Count the seconds that ``device`` waits in the block."""
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((operation, began, ended))
        else:
            start = time.perf_counter()
            yield
            self._count(operation, time.perf_counter() - start)

    def taken(self) -> dict[str, float]:
        """The seconds by operation since the last call; on a GPU it waits for what has been queued."""
        for operation, began, ended in self._events:
            ended.synchronize()
            self._count(operation, began.elapsed_time(ended) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _count(self, operation: str, seconds: float) -> None:
        self._seconds[operation] = self._seconds.get(operation, 0.0) + seconds


@dataclass(frozen=True)
class _TimedPending:
    pending: Pending
    waiting: ExposedCommTimer
    device: torch.device  # not the tensors: they may go as soon as they have left

    def wait(self) -> tuple[Tensor, ...]:
        with self.waiting.during("shift", self.device):
            return self.pending.wait()


class TimedComm:
    """``comm``, with the seconds that its rank waits counted in ``waiting``."""

    def __init__(self, comm: Comm, waiting: ExposedCommTimer) -> None:
        self.comm, self.waiting = comm, waiting
        self.rank, self.size = comm.rank, comm.size

    @property
    def traffic(self) -> Traffic:
        return self.comm.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self.comm.traffic = traffic

    def shift(self, *mine: Tensor, coming: Sequence[Shape]) -> Pending:
        return _TimedPending(self.comm.shift(*mine, coming=coming), self.waiting, mine[0].device)

    def all_to_all(self, parts: Sequence[Tensor], coming: Sequence[Shape]) -> list[Tensor]:
        with self.waiting.during("all_to_all", parts[0].device):
            return self.comm.all_to_all(parts, coming)

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        with self.waiting.during("all_gather", mine.device):
            return self.comm.all_gather(mine, shapes)
