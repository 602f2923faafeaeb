"""Progress of the first rank, and its answer as it is decoded.

Progress is a bar with the remaining time on a terminal, and one line per minute elsewhere.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

from longctx.infer.answer import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EVERY_S = 60.0


class Progress:
    """Context manager that shows progress through phases: ``start`` begins one, each ``step`` advances it.

    It prints to standard error: a bar on a terminal, one line per minute elsewhere.  A phase of unknown length shows
    that it is active.  ``shown=False`` prints nothing.
    """

    def __init__(self, *, shown: bool) -> None:
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            speed_estimate_period=math.inf,  # from the phase's beginning: steps may be slow, or come in bursts
            disable=not (shown and console.is_terminal),
        )
        self._lines = console if shown and not console.is_terminal else None
        self._last_line = time.monotonic()
        self._phase = ""
        self._task: bars.TaskID | None = None

    def start(self, phase: str, total: int | None, done: int = 0) -> None:
        """Begin ``phase`` of ``total`` steps (None: unknown) after ``done`` of them; ends the previous phase."""
        if self._task is not None:
            self._bar.stop_task(self._task)
        self._phase, self._task = phase, self._bar.add_task(phase, total=total, completed=done)

    def step(self, phase: str | None = None, total: int | None = None, note: str = "", count: int = 1) -> None:
        """Advance by ``count`` steps; first start ``phase`` of ``total`` steps if it is not the current one.

        ``note`` is shown beside the phase.
        """
        if phase and phase != self._phase:
            self.start(phase, total)
        if self._task is not None:
            self._bar.update(self._task, advance=count, description=f"{self._phase} {note}".rstrip())
            self._print_line()

    def _print_line(self) -> None:
        """Print one line of progress, at most once a minute and only if standard error is not a terminal."""
        if self._lines is None or self._task is None or time.monotonic() < self._last_line + _EVERY_S:
            return
        self._last_line = time.monotonic()
        task = self._bar.tasks[self._task]
        left = f", {task.time_remaining:,.0f} s left" if task.time_remaining is not None else ""
        of = f" of {task.total:,.0f}" if task.total else ""
        self._lines.print(f"{task.description}: {task.completed:,.0f}{of}{left}")

    def stop(self) -> None:
        """Stop drawing the bar for good, so that other text can be printed."""
        self._bar.stop()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def layers_to_run(layers: int, tokens: int, chunk: int | None) -> int:
    """Return how often a prefill of ``tokens`` runs one of ``layers``: all of them for each chunk (None: one chunk)."""
    return layers * (-(-tokens // chunk) if chunk else 1)


class TokenStream:
    """Print an answer token by token, and end before the first text in ``stop``.

    Call `add` with each token, and `end` after the last one.  If the reader of stdout has gone, nothing is printed: the
    answer is still computed and saved.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()) -> None:
        self._text = AnswerText(tokenizer, stop)

    def add(self, token: int) -> None:
        """Print the text that ``token`` completes."""
        with suppress(BrokenPipeError):
            print(self._text.add(token), end="", flush=True)

    def end(self) -> None:
        """Print the rest, after the last token."""
        with suppress(BrokenPipeError):
            print(self._text.end(), end="", flush=True)
