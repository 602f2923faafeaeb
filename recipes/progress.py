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
