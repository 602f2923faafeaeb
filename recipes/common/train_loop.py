"""Training loop of recipes.pretrain, extend and finetune: every rank runs it, from the last checkpoint on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from longctx import checkpoint_index
from longctx.parallel.launch import Rank
from longctx.perplexity import perplexity
from recipes.common.cli import say
from recipes.common.divergence import refuse_diverged_step
from recipes.common.progress import Progress
from recipes.common.train_job import TrainJob
from recipes.common.train_report import Measured, RunResult, TrainedStep
from recipes.common.train_resume import text_state
from recipes.common.train_setup import build_state, context_parallel
from recipes.common.train_text import FaultyText, TrainingText, held_out_text

if TYPE_CHECKING:
    from longctx.data.batches import Batch
    from longctx.data.stage import State
    from longctx.megatron.runtime import Runtime
    from longctx.megatron.training.checkpoint import Checkpoints
    from longctx.megatron.training.state import TrainState
    from longctx.parallel.measure.comm_timer import ExposedCommTimer
    from longctx.parallel.measure.memory import MemoryMeter
    from longctx.train.meter import Meter
    from longctx.train.step import ContextParallel
    from longctx.train.stop import StopRequest
    from longctx.train.track import Tracker

Item = TypeVar("Item")


@dataclass(frozen=True)
class Start:
    """Resume point of a run: its last step, the resume state of its text, and the id of the record of its metrics.

    ``data`` and ``run_id`` are None in a new run.  The record has an entry for each step; entry 0 has samples of the
    text.  On resume, entries from ``first_record`` on are deleted.
    """

    step: int = 0
    first_record: int = 0
    data: State | None = None
    run_id: str | None = None


def run_rank(rank: Rank, job: TrainJob) -> RunResult:
    """Train on one rank, from the last checkpoint on; every rank runs this, and the caller uses the first's result.

    Saves a checkpoint every ``checkpoint.every`` steps and after the last step.  The first rank records the metrics.
    Raises FloatingPointError if training diverges.
    """
    from longctx.megatron.training.checkpoint import Checkpoints
    from longctx.train.step import time_communication
    from longctx.train.stop import StopRequest

    stop, settings, first = StopRequest(), job.settings, rank.rank == 0
    report = say if first else lambda _: None
    with job.target.runtime(rank, training=True) as untimed, Progress(shown=first) as progress:
        runtime, timer = time_communication(untimed)
        # 1. Build the model and its optimizer, and load the last checkpoint.
        progress.start("loading", None)
        state = build_state(runtime, job)
        start = resume(state, job, report)
        checkpoints = Checkpoints(job.out / "checkpoints", job.saving.keep, start.step, report)
        # 2. Open the run's record.
        tracker, run_id = _open_record(job, start, report, first)
        # 3. Train; save at regular steps and at the end.
        progress.start("training, steps", settings.steps, done=start.step)
        last_step, loss, measured = start.step, None, Measured()
        for done in _saving_first(train_steps(state, runtime, timer, job, start, stop), checkpoints):
            tracker.log(done.figures, done.step)
            refuse_diverged_step(done.step, done.figures, checkpoints, job.out / "checkpoints", job.target.model.dtype)
            measured = measured.after(done)
            last_step, loss = done.step, float(done.figures["loss"] or 0.0)
            progress.step(note=f"loss {loss:.4f}, {done.figures['tokens_per_s']:,.0f} tokens/s")
            if done.ends_run or done.step % job.saving.every == 0:
                # The first rank writes the metadata.
                metadata = {"data": done.data, "run_id": run_id, "config": dict(job.config)}
                checkpoints.save(state, done.step, {**metadata, "text": job.text_digests if first else None})
            else:
                checkpoints.poll()
        # 4. Wait for the last checkpoint, and close the record.
        checkpoints.poll(wait=True)
        tracker.artifact(f"checkpoint-{run_id}", "checkpoint", checkpoints.latest)
        tracker.finish()
    if last_step < settings.steps:
        report(_reason_to_end(job, last_step, stop))
    return RunResult(last_step, loss, str(checkpoints.latest), stop.agreed_on, measured)


def _saving_first(steps: Iterator[TrainedStep], checkpoints: Checkpoints) -> Iterator[TrainedStep]:
    """Yield ``steps``; before a `FaultyText` of all ranks leaves them, complete the checkpoint in progress."""
    try:
        yield from steps
    except FaultyText:
        checkpoints.poll(wait=True)
        raise


def _open_record(job: TrainJob, start: Start, say: Callable[[str], None], first: bool) -> tuple[Tracker, str | None]:
    """Return the tracker of the run's metrics, and the id of their record; only the ``first`` rank tracks.

    In a new run, a table with samples of the text is tracked first.
    """
    from longctx.train.track import start_tracking

    step, run_id = start.first_record, start.run_id
    tracker, run_id = start_tracking(job.track, job.out, job.config, first=first, say=say, step=step, run_id=run_id)
    if not start.step:
        tracker.table("samples", ("tokens", "documents", "text"), job.samples, 0)
    return tracker, run_id


def _reason_to_end(job: TrainJob, step: int, stop: StopRequest) -> str:
    if stop.agreed_on:
        return f"stopped after step {step}, as asked: the same command resumes"
    return f"the text ended after step {step}: data.epochs={job.data.epochs}"


def resume(state: TrainState, job: TrainJob, report: Callable[[str], None]) -> Start:
    """Load the last whole checkpoint into ``state`` and return its resume point; a new run starts at step 0.

    Every rank calls this.  ``report`` receives lines for the user, such as why a checkpoint was skipped.  Raises
    ValueError if the run has checkpoints, but none is whole.
    """
    from longctx.megatron.training import checkpoint

    folder, passed_over = checkpoint.agreed_on_all_ranks(job.out / "checkpoints")
    for reason in passed_over:
        report(f"checkpoint skipped: {reason}")
    if not folder:
        return Start()
    if line := checkpoint_index.unchecked_line(folder):
        report(line)
    checkpoint.load(folder, state)
    metadata = checkpoint_index.read_metadata(folder)
    report(f"resuming after step {metadata['step']}, from {folder}")
    data = text_state(metadata)
    was, now = data["documents"] and data["documents"]["weights"], [source.weight for source in job.data.sources]
    if was and was != now:
        report(f"data.sources: weights were {was}, now {now}: from here on, sources are mixed by the new weights")
    return Start(metadata["step"], metadata["step"] + 1, data, metadata["run_id"])


def train_steps(
    state: TrainState, runtime: Runtime, timer: ExposedCommTimer, job: TrainJob, start: Start, stop: StopRequest
) -> Iterator[TrainedStep]:
    """Train from ``start`` to the last step or the end of the text; yield each step when it is done.

    Every rank iterates.  Held-out text is evaluated every ``evaluate.every`` steps and after the last step.  A request
    to stop ends the run after the current step, without an evaluation that is not due.  So does a fault of the text
    that a rank reads next: then every rank raises `FaultyText`, after the step was yielded.
    """
    from longctx.attention.backends import checked_kernel
    from longctx.data.batches import left_out
    from longctx.train.memory import memory_meter
    from longctx.train.meter import Meter

    target = job.target
    # 1. How sequences are sharded and attended to, and how a step is measured.
    dtype, head_dim = target.model.dtype, target.shape.head_dim
    kernel = checked_kernel(target.context.kernel, runtime.device, dtype, head_dim, runtime.slowest)
    parallelism = context_parallel(runtime, state, job, kernel)
    meter = Meter(target.shape, target.mesh.ranks, runtime.device, timer, job.peak_flops)
    # 2. The text.
    held_out, step = held_out_text(job, runtime), start.step
    text = TrainingText(job, runtime, step, start.data)
    # 3. Step by step.
    for step, batch, data, ends_text in text:
        # Count the bytes of the second step: in the first one, the optimizer's moments do not exist yet.
        memory = memory_meter(state) if job.machine and step == start.step + 2 else None
        figures, peak = _train_one(state, batch, runtime, parallelism, meter, memory)
        figures |= {f"data/{name}": count for name, count in left_out(data).items()}
        # After this, all ranks agree on whether the step is the last one.
        stops = stop.agreed_on_all_ranks(runtime.world, runtime.device, fault=text.fault is not None)
        if is_last := ends_text and not stop.has_fault:
            stop.agreed_on = False  # the run ends by itself
        if held_out and (is_last or step % job.evaluation.every == 0):
            figures |= evaluate_held_out(state, held_out, runtime, parallelism, job)
        ends_run = is_last or stops
        yield TrainedStep(step, figures, data, ends_run, batch.documents, peak)
        if ends_run:
            break
    stop.over()
    text.refuse_fault(stop, step)


def _train_one(
    state: TrainState,
    batch: Batch,
    runtime: Runtime,
    parallelism: ContextParallel,
    meter: Meter,
    memory: MemoryMeter | None,
) -> tuple[dict[str, float | None], dict[str, int] | None]:
    """Take one step; return its figures, and the bytes by part at the peak of the rank with the largest one.

    The bytes are None without a ``memory`` meter.
    """
    from longctx.train.step import train_step

    meter.begin()
    with memory or nullcontext():
        result = train_step(state, batch, runtime, parallelism)
    cost = meter.end([n for lengths in batch.documents for n in lengths])
    figures: dict[str, float | None] = {"loss": result.loss, "grad_norm": result.grad_norm}
    figures |= {"tokens": result.tokens, "lr": result.rate}
    figures |= {} if result.router_loss is None else {"router_loss": result.router_loss}
    figures |= {"comm/experts_bytes": result.experts_bytes} if runtime.ep.size > 1 else {}
    figures |= {"offloaded_bytes": parallelism.offload.peak} if parallelism.offload else {}
    figures |= cost.figures()
    return figures, memory.largest_peak(runtime.world, runtime.device) if memory else None


def evaluate_held_out(
    state: TrainState, held_out: list[Batch], runtime: Runtime, parallelism: ContextParallel, job: TrainJob
) -> dict[str, float | None]:
    """Return eval/loss (nats a token), eval/perplexity, and eval/perplexity_to_N by position in the document.

    There are ``job.evaluation.buckets`` equal ranges of positions, and N is the end of one.  A range without tokens has
    None.  ``held_out`` has this data-parallel rank's batches.  Every rank calls this and gets the same figures.
    """
    from longctx.train.step import evaluate

    buckets = job.evaluation.buckets
    sums = evaluate(state, held_out, runtime, parallelism, buckets)
    # Rounded up: a range ends before the first position of the next one.
    edges = [-(-job.data.length * (i + 1) // buckets) for i in range(buckets)]
    by_position = {
        f"eval/perplexity_to_{edge}": None if loss is None else perplexity(loss)
        for edge, loss in zip(edges, sums.means, strict=True)
    }
    return {"eval/loss": sums.mean, "eval/perplexity": perplexity(sums.mean), **by_position}
