"""One progress bar at a time, on a terminal only, on one rank only."""

from types import TracebackType

from rich import progress as bars
from rich.console import Console


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
        self._phase = ""
        self._task: bars.TaskID | None = None

    def start(self, phase: str, total: int | None) -> None:
        """End the phase before, and begin ``phase`` of ``total`` steps."""
        if self._task is not None:
            self._bar.stop_task(self._task)
        self._phase, self._task = phase, self._bar.add_task(phase, total=total)

    def step(self, phase: str | None = None, total: int | None = None) -> None:
        """One step further in the phase, or in ``phase``, which is started if it has not been."""
        if phase and phase != self._phase:
            self.start(phase, total)
        if self._task is not None:
            self._bar.advance(self._task)

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
