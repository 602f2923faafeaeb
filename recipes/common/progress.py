"""One progress bar at a time, on one rank only; where there is no terminal, as in a job's log, a line a minute."""

import time
from types import TracebackType

from rich import progress as bars
from rich.console import Console

_EVERY_S = 60.0


class Progress:
    """``start`` a phase, ``step`` through it; a phase without a length shows that something is going on."""

    def __init__(self, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._lines = console if shown and not console.is_terminal else None
        self._said = time.monotonic()
        self._phase = ""
        self._task: bars.TaskID | None = None

    def start(self, phase: str, total: int | None, done: int = 0) -> None:
        """End the phase before, and begin ``phase`` of ``total`` steps, of which some may be ``done``."""
        if self._task is not None:
            self._bar.stop_task(self._task)
        self._phase, self._task = phase, self._bar.add_task(phase, total=total, completed=done)

    def step(self, phase: str | None = None, total: int | None = None, note: str = "") -> None:
        """One step further in the phase, or in ``phase``, which is started if it has not been; ``note`` is shown."""
        if phase and phase != self._phase:
            self.start(phase, total)
        if self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{self._phase} {note}".rstrip())
            self._say()

    def _say(self) -> None:
        """How far it is, if nothing has been said for a minute."""
        if self._lines is None or self._task is None or time.monotonic() < self._said + _EVERY_S:
            return
        self._said = time.monotonic()
        task = self._bar.tasks[self._task]
        left = f", {task.time_remaining:,.0f} s left" if task.time_remaining is not None else ""
        of = f" of {task.total:,.0f}" if task.total else ""
        self._lines.print(f"{task.description}: {task.completed:,.0f}{of}{left}", highlight=False)

    def stop(self) -> None:
        """Leave the line to others, as text that is being written."""
        self._bar.stop()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
