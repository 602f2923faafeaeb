"""Last figures of a training run; with ``hardware``, a step's time and memory compared with their predictions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from longctx.cost.forward import Numbers
from longctx.cost.numerals import three_digits
from longctx.cost.step import step_cost
from longctx.hf.checkpoint import export_command
from recipes.common.cli import STOPPED, console
from recipes.common.predicted import ELEMENT_BYTES, beside, is_balanced
from recipes.common.train_job import TrainJob
from recipes.common.train_memory import describe_memory, predict_memory, step_work

if TYPE_CHECKING:
    from longctx.data.stage import State


@dataclass(frozen=True)
class TrainedStep:
    """One step: its number, its figures, the data's resume state after it, and whether the run ends with it.

    ``figures`` has metrics by name; a value that is not known is None.  ``documents`` has the lengths of the documents
    in each sequence.  ``memory`` has the bytes by part at the peak of the rank with the largest one, None if they were
    not counted.
    """

    step: int
    figures: dict[str, float | None]
    data: State
    ends_run: bool
    documents: tuple[tuple[int, ...], ...] = ()
    memory: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds of each of a run's last 100 steps, and the peak memory of a step in bytes by part (None: not counted).

    ``steps`` counts the steps of this start.  ``documents`` has, for each of ``seconds``, the lengths of the documents
    in each sequence of its step.  ``offloaded`` are the most bytes of activations that the first rank had offloaded at
    once (None: it offloads none).  The first step warms up, and a step whose bytes are counted is slower: their seconds
    are left out.
    """

    steps: int = 0
    seconds: tuple[float, ...] = ()
    memory: Mapping[str, int] | None = None
    offloaded: float | None = None
    documents: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def after(self, done: TrainedStep) -> Measured:
        """Return the figures after the step ``done``; if its bytes were not counted, the last count stays."""
        memory, step_s, offloaded = done.memory, done.figures["step_s"], done.figures.get("offloaded_bytes")
        figures = replace(self, steps=self.steps + 1, memory=memory or self.memory, offloaded=offloaded)
        if self.steps == 0 or memory or step_s is None:
            return figures
        seconds, documents = (*self.seconds[-99:], step_s), (*self.documents[-99:], done.documents)
        return replace(figures, seconds=seconds, documents=documents)


@dataclass(frozen=True)
class RunResult:
    """Result of a run: its last step, that step's loss (nats a token), and the folder of the last checkpoint.

    ``stopped`` is True if the run ended early, because it was asked to.
    """

    step: int
    loss: float | None  # None if no step was left to run
    checkpoint: str
    stopped: bool
    measured: Measured = Measured()


def predict_step(job: TrainJob, documents: tuple[tuple[int, ...], ...]) -> float | None:
    """Return the predicted seconds of a training step; None without constants of a machine.

    It is also None for what the cost model has no times of: offload, a ring with a layout other than zigzag, and more
    ranks than the machine's links are known for.
    ``documents`` has the lengths of the documents in each sequence.
    """
    if job.machine is None or job.target.mesh.ranks > job.machine.gpus or job.settings.offload:
        return None
    if not is_balanced(job.target.context, job.target.mesh):
        return None
    target, size = job.target, ELEMENT_BYTES[job.target.model.dtype]
    share = len(target.plan.dropped) / target.shape.layers if target.plan and target.mesh.tp > 1 else 0.0
    numbers, strategy = Numbers(size, size, share), target.context.strategy
    return step_cost(target.shape, target.mesh, job.machine, step_work(job, documents), strategy, numbers).seconds


def compared(job: TrainJob, measured: Measured) -> list[tuple[str, str]]:
    """Return rows (name, text) of a table: measured time and memory of a step, each with its prediction.

    The times are medians over the same steps, each predicted for its documents.
    A last row has the offloaded bytes, without a prediction.  A figure that was not measured has no row; nor has the
    time without a prediction.
    """
    table_rows = list[tuple[str, str]]()
    steps = [predict_step(job, documents) for documents in measured.documents]
    known = [seconds for seconds in steps if seconds is not None]  # all of them, or none
    if known:
        seconds, predicted = median(measured.seconds), {"step_s": median(known)}
        table_rows.append(("time of a step", f"{three_digits(seconds)} s{beside(seconds, predicted, 'step_s')}"))
    if measured.memory:
        table_rows.append(("peak memory of a step", describe_memory(measured.memory, predict_memory(job))))
    if measured.offloaded is not None:
        table_rows.append(
            ("offloaded", f"{measured.offloaded / 1e6:,.1f} MB of activations, to {job.settings.offload}")
        )
    return table_rows


def show(job: TrainJob, result: RunResult) -> None:
    """Print the run's last figures and how to export it; exit with code 75 if it was asked to stop."""
    table = Table(show_header=False, box=None)
    table.add_row("step", f"{result.step:,} of {job.settings.steps:,}, on {job.target.mesh}")
    table.add_row("loss", "no step was left to run" if result.loss is None else f"{result.loss:.4f}")
    for name, value in compared(job, result.measured):
        table.add_row(name, value)
    table.add_row("figures", str(job.out / "metrics.jsonl"))
    table.add_row("checkpoint", result.checkpoint)
    if not job.config["dropped"]:  # transformers has no blocks that drop a reduction
        to = job.out / "hf"
        table.add_row("to transformers", export_command(job.out, job.out / f"hf-{result.step}" if to.exists() else to))
    console.print(table)
    if result.stopped:
        sys.exit(STOPPED)
