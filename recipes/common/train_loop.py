"""What recipes.pretrain and recipes.extend share: every rank runs the same loop, and a run resumes."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from rich.table import Table

from longctx import checkpoint_index
from longctx.parallel.launch import Rank
from longctx.train.stop import StopRequest
from recipes.common.cli import STOPPED, console, say
from recipes.common.progress import Progress
from recipes.common.train_job import TrainJob


def run_rank(rank: Rank, job: TrainJob) -> dict[str, Any]:
    """One rank's part of the run, from its last checkpoint on; the figures of its end."""
    from longctx.megatron.training.checkpoint import Checkpoints
    from longctx.train.track import start_tracking

    stop = StopRequest()
    settings, first = job.settings, rank.rank == 0
    with job.target.runtime(rank, training=True) as here, Progress(shown=first) as progress:
        progress.start("loading", None)
        trained = built(here, job)
        tell = say if first else lambda _: None
        behind = resumed(trained, job, tell)
        saved = Checkpoints(job.out / "checkpoints", job.saving.keep)
        tracker, run_id = start_tracking(
            job.track, job.out, job.config, first=first, say=tell, step=behind["next"], run_id=behind["run_id"]
        )
        if not behind["step"]:
            tracker.table("samples", ("tokens", "documents", "text"), job.samples, 0)
        progress.start("training, steps", settings.steps, done=behind["step"])
        ended = {"step": behind["step"], "loss": math.nan}
        for step, figures, data, last in steps(trained, here, job, behind, stop):
            tracker.log(figures, step)
            ended = {"step": step, "loss": figures["loss"]}
            progress.step(note=f"loss {ended['loss']:.4f}, {figures['tokens_per_s']:,.0f} tokens/s")
            if last or step % job.saving.every == 0:
                saved.save(trained, step, {"data": data, "run_id": run_id, "config": dict(job.config)})
            else:
                saved.poll()
        saved.poll(wait=True)
        tracker.artifact(f"checkpoint-{run_id}", "checkpoint", saved.latest)
        tracker.finish()
    if ended["step"] < settings.steps:
        why = (
            "stopped {}, as asked: the same command goes on" if stop.agreed_on else "the text ended {}: data.epochs={}"
        )
        tell(why.format(f"behind step {ended['step']}", job.data.epochs))
    return {**ended, "checkpoint": str(saved.latest), "stopped": stop.agreed_on}


def built(here: Any, job: TrainJob) -> Any:
    """The model on its ranks with its first weights, and its optimizer."""
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.training.optimizer import build_train_state

    dropped = job.target.plan.dropped if job.target.plan else ()
    read = hf_load.Weights(job.weights, dropped) if job.weights else RandomInit(job.target.shape, job.settings.seed)
    return build_train_state(
        here,
        job.target.shape,
        job.optim,
        lambda net: hf_load.load(net, read, job.target.shape),
        dtype=getattr(torch, job.target.model.dtype),
        layers="local",
        steps=job.settings.steps,
        recompute=job.settings.recompute,
        plan=job.target.plan,
    )


def resumed(trained: Any, job: TrainJob, tell: Callable[[str], None]) -> dict[str, Any]:
    """What was written with the last whole checkpoint, which ``trained`` then is; of a new run, where it begins.

    ``next`` is the step from which on its record is written anew: of a new run the samples, before the first step, too.
    """
    from longctx.megatron.training import checkpoint

    place, passed = checkpoint.agreed_on_all_ranks(job.out / "checkpoints")
    for why in passed:
        tell(f"passed over: {why}")
    if not place:
        return {"step": 0, "next": 0, "data": None, "run_id": None}
    checkpoint.load(place, trained)
    behind = checkpoint_index.about(place)
    behind["next"] = behind["step"] + 1
    tell(f"going on behind step {behind['step']}, from {place}")
    return behind


def steps(
    trained: Any, here: Any, job: TrainJob, behind: dict[str, Any], stop: StopRequest
) -> Iterator[tuple[int, dict[str, Any], Any, bool]]:
    """Train, step by step: its number, its figures, where the data stands behind it, and whether it is the last.

    What is measured does not depend on whether the run was asked to stop there.
    """
    from longctx.attention.backends import checked_kernel
    from longctx.data.batches import left_out, training_batches
    from longctx.hf.config import tokenizer_of
    from longctx.parallel.measure.comm_timer import ExposedCommTimer, TimedComm
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.meter import Meter
    from longctx.train.step import Sharding, train_step

    part, parts, settings = here.groups.dp.rank(), here.groups.dp.size(), job.settings
    kernel = checked_kernel(job.target.context.kernel, here.device, job.target.model.dtype, job.target.shape.head_dim)
    strategy, keeping = STRATEGIES[job.target.context.strategy], settings.recompute != "none"
    how = Sharding(job.data.length, job.target.context.layout, kernel, strategy, keeping)
    waiting = ExposedCommTimer()
    timed = replace(here, ulysses=TimedComm(here.ulysses, waiting), ring=TimedComm(here.ring, waiting))
    meter = Meter(job.target.shape, job.target.mesh.ranks // parts, here.device, waiting, job.peak_flops)
    held_out = _held_out(job, part, parts)
    batches = training_batches(job.data, tokenizer_of(job.target.folder), part, parts)(behind["data"])
    to_come = with_last(islice(batches, settings.steps - behind["step"]))
    for step, ((batch, data), last) in enumerate(to_come, behind["step"] + 1):
        meter.begin()
        did = train_step(trained, batch, timed, how)
        cost = meter.end([n for lengths in batch.lengths for n in lengths])
        figures = {"loss": did.loss, "grad_norm": did.grad_norm, "tokens": did.tokens, "lr": did.rate, **cost.figures()}
        figures |= {
            "tokens_per_s": parts * cost.tokens / cost.seconds,
            **{f"data/{count}": n for count, n in left_out(data).items()},
        }
        if held_out and (last or step % job.evaluation.every == 0):
            figures |= measured(trained, held_out, here, how, job)
        ends = last or stop.agreed_on_all_ranks(here.world, here.device)
        yield step, figures, data, ends
        if ends:
            break
    stop.over()


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each of ``items``, and whether nothing follows."""
    before: list[Any] = []
    for item in items:
        if before:
            yield before.pop(), False
        before.append(item)
    for item in before:
        yield item, True


def _held_out(job: TrainJob, part: int, parts: int) -> list[Any]:
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of

    if not job.test:
        return []
    batches: Iterator[Any] = training_batches(job.test, tokenizer_of(job.target.folder), part, parts)(None)
    return [batch for batch, _ in islice(batches, job.evaluation.batches)]


def measured(trained: Any, held_out: list[Any], here: Any, how: Any, job: TrainJob) -> dict[str, float | None]:
    """Loss and perplexity of held-out text, over all of it and by position in the document."""
    from longctx.train.step import evaluate

    sums = evaluate(trained, held_out, here, how, job.evaluation.buckets)
    edges = [job.data.length * (i + 1) // job.evaluation.buckets for i in range(job.evaluation.buckets)]
    by_position = {
        f"eval/perplexity_to_{edge}": None if loss is None else math.exp(loss)
        for edge, loss in zip(edges, sums.means, strict=True)
    }
    return {"eval/loss": sums.mean, "eval/perplexity": math.exp(sums.mean), **by_position}


def show(job: TrainJob, ended: dict[str, Any]) -> None:
    """How a run ended, and what to do with it; one that was asked to stop ends with exit code 75."""
    table = Table(show_header=False, box=None)
    table.add_row("step", f"{ended['step']:,} of {job.settings.steps:,}, on {job.target.mesh}")
    table.add_row("loss", f"{ended['loss']:.4f}")
    table.add_row("figures", str(job.out / "metrics.jsonl"))
    table.add_row("checkpoint", ended["checkpoint"])
    table.add_row("to transformers", f"python -m recipes.export checkpoint={job.out} to={job.out}/hf")
    console.print(table)
    if ended["stopped"]:
        sys.exit(STOPPED)
