"""Exposed communication: the seconds that a rank waits for others, measured by a wrapper around its `Comm`.

Communication that computation hides costs no time.  The rest, for which the rank waits, is exposed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from longctx.parallel.comm import Comm, Pending, Shape, Traffic
from longctx.shapes import AnyShape


@dataclass
class ExposedCommTimer:
    """Seconds that a rank waits for others, by operation, summed over all `TimedComm` groups that share the timer.

    On a GPU the stream waits and not the process.  The time is therefore taken between two events on the stream: from
    the end of the work that was queued before the wait to the end of the wait.
    """

    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def during(self, operation: str, device: torch.device) -> Iterator[None]:
        """Add the seconds that ``device`` waits in the block to ``operation``."""
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

    def pop_seconds(self) -> dict[str, float]:
        """Return the seconds by operation since the last call, and reset them; on a GPU wait for the queued events."""
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
    timer: ExposedCommTimer
    device: torch.device  # and not the sent tensors, which may be freed once they have been sent

    def wait(self) -> tuple[AnyShape, ...]:
        """Wait for the tensors and count the seconds."""
        with self.timer.during("shift", self.device):
            return self.pending.wait()


class TimedComm:
    """A `Comm` that forwards every call to ``comm`` and counts the seconds of waiting in ``timer``."""

    def __init__(self, comm: Comm, timer: ExposedCommTimer) -> None:
        self.comm, self.timer = comm, timer
        self.rank, self.size = comm.rank, comm.size

    @property
    def traffic(self) -> Traffic:
        """The traffic of ``comm``."""
        return self.comm.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self.comm.traffic = traffic

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Start a shift of ``comm``; the wait for it counts as "shift"."""
        return _TimedPending(self.comm.shift(*mine, shapes=shapes), self.timer, mine[0].device)

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Run an all-to-all of ``comm``, all of which counts as waiting."""
        with self.timer.during("all_to_all", parts[0].device):
            return self.comm.all_to_all(parts, shapes, small=small)

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Run an all-gather of ``comm``, all of which counts as waiting."""
        with self.timer.during("all_gather", mine.device):
            return self.comm.all_gather(mine, shapes)
