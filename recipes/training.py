"""What recipes.pretrain and recipes.extend share: a job is checked, every rank runs the same loop, a run resumes."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.attention.backends import kernel_for
from longctx.parallel.launch import Rank
from longctx.parallel.mesh import refuse_unfit
from longctx.schema import Context, DataSettings, Mesh, ModelShape, ModelSource, Optim, Recompute, Track
from recipes.calibrate import hardware_from
from recipes.machine import provenance
from recipes.progress import Progress
from recipes.start import console, say, section, threads_for, top_level

BYTES_OF_A_WEIGHT = 4 + 3 * 4  # itself, and in float32 the optimizer's copy and its two moments


@dataclass(frozen=True)
class Settings:
    """The settings of configs/pretrain.yaml and extend.yaml that are not a section of their own."""

    steps: PositiveInt
    seed: NonNegativeInt
    recompute: Recompute
    hardware: str | None
    threads: PositiveInt | None
    device: Literal["cpu", "cuda"]
    timeout_minutes: PositiveInt
    out: str


@dataclass(frozen=True)
class Evaluation:
    """How often held-out text is measured, and on how much of it."""

    every: NonNegativeInt
    batches: PositiveInt
    buckets: PositiveInt


@dataclass(frozen=True)
class Saving:
    """How often a checkpoint is made, and how many stay."""

    every: PositiveInt
    keep: PositiveInt


@dataclass(frozen=True)
class Job:
    """What every rank needs to know: plain values, checked before any rank starts.

    ``weights`` is the folder of what it begins with, None from scratch; `described` has configuration and tokenizer.
    """

    model: ModelSource
    weights: Path | None
    shape: ModelShape
    mesh: Mesh
    context: Context
    data: DataSettings
    test: DataSettings | None
    optim: Optim
    track: Track
    evaluation: Evaluation
    saving: Saving
    settings: Settings
    peak_flops: float | None
    config: Mapping[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def described(self) -> Path:
        """A Hugging Face folder without weights, of what is trained here; what an export begins with."""
        return self.out / "model"


def job_of(config: DictConfig, source: Path, changed: Mapping[str, Any], weights: Path | None) -> Job:
    """The job that ``config`` asks for: ``source``'s model, its config.json with fields ``changed``.

    Raises ValueError, with what to do instead, if it cannot be done.
    """
    from longctx.data.batches import training_batches
    from longctx.parallel.strategy import STRATEGIES
    from longctx.pretrained import shape_of, tokenizer_of

    mesh, context = section(config, "mesh", Mesh), section(config, "context", Context)
    settings, model = top_level(config, Settings), section(config, "model", ModelSource)
    refuse_unwritable_folder(settings.out)
    described = describe(source, changed, Path(settings.out))
    shape, tokenizer = shape_of(described), tokenizer_of(described)
    data, test = data_of(config)
    if context.strategy not in STRATEGIES:
        raise ValueError(f"context.strategy={context.strategy} is for inference: use one of {', '.join(STRATEGIES)}")
    kernel_for(context.kernel, settings.device, model.dtype)
    refuse_unfit(mesh, shape)
    refuse_unsplit(mesh, shape, data)
    evaluation = section(config, "evaluate", Evaluation)
    for wanted in (data, test):
        if wanted:
            training_batches(wanted, tokenizer, 0, mesh.dp)  # refuses files that are not there
    job = Job(
        model=model,
        weights=weights,
        shape=shape,
        mesh=mesh,
        context=context,
        data=data,
        test=test if evaluation.every else None,
        optim=section(config, "optim", Optim),
        track=section(config, "track", Track),
        evaluation=evaluation,
        saving=section(config, "checkpoint", Saving),
        settings=settings,
        peak_flops=hardware_from(settings.hardware).peak_flops if settings.hardware else None,
        config={**provenance(), **_plain(config)},
    )
    refuse_no_room(job)
    refuse_other_optimizer(job)
    return job


def data_of(config: DictConfig) -> tuple[DataSettings, DataSettings | None]:
    """What is trained on, and what is measured on, if anything is."""
    plain = OmegaConf.create({"data": {k: v for k, v in _plain(config)["data"].items() if k != "test"}})
    data, test = section(plain, "data", DataSettings), OmegaConf.to_container(config.data.test, resolve=True)
    if not test:
        return data, None
    held_out = OmegaConf.create({"data": {"sources": test, "length": data.length, "batch": data.batch}})
    return data, replace(section(held_out, "data", DataSettings), end_token=data.end_token)


def _plain(config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=True)
    return {str(name): value for name, value in values.items()}


def refuse_unsplit(mesh: Mesh, shape: ModelShape, data: DataSettings) -> None:
    """ValueError unless stages get as many layers each, ranks as many sequences, and sequences fit model and mesh."""
    if shape.layers % mesh.pp:
        fit = [n for n in range(1, shape.layers + 1) if shape.layers % n == 0]
        nearest = min(fit, key=lambda n: (abs(n - mesh.pp), n))
        raise ValueError(f"mesh.pp={mesh.pp} does not divide {shape.layers} layers: use mesh.pp={nearest}")
    if data.length > shape.positions:
        raise ValueError(
            f"data.length={data.length:,} is more than the model's context of {shape.positions:,}: "
            f"use at most that, or lengthen it with recipes.extend"
        )
    if data.length < mesh.context:
        raise ValueError(
            f"data.length={data.length} for {mesh.context} context ranks: use a longer one, or fewer ranks"
        )


def refuse_unwritable_folder(out: str) -> None:
    """ValueError unless the folder ``out`` can be written; it is made."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, ".writable").touch()
        Path(out, ".writable").unlink()
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}): give a folder of yours") from error


def describe(source: Path, changed: Mapping[str, Any], out: Path) -> Path:
    """``out``/model: ``source`` without weights, fields of its config.json ``changed``.

    Raises ValueError if a run of another model is there.
    """
    from longctx.described import write_like

    with tempfile.TemporaryDirectory(dir=out, prefix=".model.") as work:
        write_like(source, changed, Path(work, "model"))
        wanted, there = (folder / "config.json" for folder in (Path(work, "model"), out / "model"))
        if not there.exists():
            Path(work, "model").rename(out / "model")
        elif there.read_text() != wanted.read_text():
            raise ValueError(f"out={out} has a run of another model, or of another context: give another folder")
    return out / "model"


def refuse_no_room(job: Job) -> None:
    """ValueError unless ``out`` has room for the checkpoints that will be there at once."""
    needed = weights_of(job.shape) * BYTES_OF_A_WEIGHT * (job.saving.keep + 1)
    if (free := shutil.disk_usage(job.out).free) < needed:
        raise ValueError(
            f"out={job.out} has {free / 1e9:.1f} GB free, {job.saving.keep + 1} checkpoints of this model take "
            f"{needed / 1e9:.1f}: use another disk, or a lower checkpoint.keep"
        )


def refuse_other_optimizer(job: Job) -> None:
    """ValueError if the checkpoint to go on from has the optimizer's state in the other form."""
    from longctx.megatron.checkpoint import about, latest

    place, _ = latest(job.out / "checkpoints")
    if place and (zero1 := about(place)["config"]["optim"]["zero1"]) != job.optim.zero1:
        raise ValueError(
            f"{place} was made with optim.zero1={str(zero1).lower()}: go on with that, or in another folder"
        )


def weights_of(shape: ModelShape) -> int:
    """Weights of a model of ``shape``, to within its norms and biases."""
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_width
    return shape.layers * shape.hidden * (heads + 3 * shape.ffn) + (2 - shape.tied) * shape.vocabulary * shape.hidden


def run_rank(rank: Rank, job: Job) -> dict[str, Any]:
    """One rank's part of the run, from its last checkpoint on; the figures of its end."""
    from longctx.megatron.checkpoint import Checkpoints
    from longctx.megatron.runtime import runtime
    from longctx.train.track import start_tracking

    settings, first = job.settings, rank.rank == 0
    threads, minutes = threads_for(settings.threads, rank), settings.timeout_minutes
    with (
        runtime(
            rank, job.mesh, device=settings.device, threads=threads, timeout_minutes=minutes, training=True
        ) as here,
        Progress(shown=first) as progress,
    ):
        progress.start("loading", None)
        trained = built(here, job)
        tell = say if first else lambda _: None
        kept = resumed(trained, job, tell)
        saved = Checkpoints(job.out / "checkpoints", job.saving.keep)
        tracker, run_id = start_tracking(
            job.track, job.out, job.config, first=first, say=tell, step=kept["step"] + 1, run_id=kept["run_id"]
        )
        if not kept["step"]:
            tracker.table("samples", ("tokens", "documents", "text"), samples(job), 0)
        progress.start("training, steps", settings.steps, done=kept["step"])
        ended = {"step": kept["step"], "loss": math.nan}
        for step, figures, data in steps(trained, here, job, kept):
            tracker.log(figures, step)
            progress.step(note=f"loss {figures['loss']:.4f}, {figures['tokens_per_s']:,.0f} tokens/s")
            ended = {"step": step, "loss": figures["loss"]}
            if step == settings.steps or step % job.saving.every == 0:
                saved.save(trained, step, {"data": data, "run_id": run_id, "config": dict(job.config)})
            else:
                saved.poll()
        saved.poll(wait=True)
        place = saved.latest
        if place:
            tracker.artifact(f"checkpoint-{run_id}", "checkpoint", place)
        tracker.finish()
    return {**ended, "checkpoint": str(place)}


def samples(job: Job) -> list[tuple[int, int, str]]:
    """The first sequences as the model sees them: so many tokens, of so many documents, how the text begins."""
    from longctx.data.batches import training_batches
    from longctx.pretrained import tokenizer_of

    tokenizer = tokenizer_of(job.described)
    batch, _ = next(training_batches(job.data, tokenizer)(None))
    shown = zip(batch.tokens, batch.lengths, strict=True)
    return [(len(ids), sum(n > 0 for n in lengths), tokenizer.decode(ids[:128].tolist())) for ids, lengths in shown]


def built(here: Any, job: Job) -> Any:
    """The model on its ranks with its first weights, and its optimizer."""
    from longctx.megatron import weights
    from longctx.megatron.initial import Drawn
    from longctx.megatron.model import layers_in_use
    from longctx.megatron.training import trainable

    read = weights.Weights(job.weights) if job.weights else Drawn(job.shape, job.settings.seed)
    return trainable(
        here,
        job.shape,
        job.optim,
        lambda net: weights.load(net, read, job.shape),
        dtype=getattr(torch, job.model.dtype),
        layers=layers_in_use(job.model.layers),
        steps=job.settings.steps,
        recompute=job.settings.recompute,
    )


def resumed(trained: Any, job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """What was written with the last whole checkpoint, which ``trained`` then is; of a new run, where it begins."""
    from longctx.megatron import checkpoint

    place, passed = checkpoint.latest(job.out / "checkpoints")
    for why in passed:
        tell(f"passed over: {why}")
    if not place:
        return {"step": 0, "data": None, "run_id": None}
    checkpoint.load(place, trained)
    kept = checkpoint.about(place)
    tell(f"going on behind step {kept['step']}, from {place}")
    return kept


def steps(trained: Any, here: Any, job: Job, kept: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Train, step by step: its number, its figures, and where the data stands behind it."""
    from longctx.attention.backends import checked_kernel
    from longctx.data.batches import left_out, training_batches
    from longctx.parallel.strategy import STRATEGIES
    from longctx.parallel.waiting import TimedComm, Waiting
    from longctx.pretrained import tokenizer_of
    from longctx.train.meter import Meter
    from longctx.train.step import Sharding, train_step

    part, parts, settings = here.groups.dp.rank(), here.groups.dp.size(), job.settings
    kernel = checked_kernel(job.context.kernel, here.device, job.model.dtype)
    strategy, keeping = STRATEGIES[job.context.strategy], settings.recompute != "none"
    how = Sharding(job.data.length, job.context.layout, kernel, strategy, keeping)
    waiting = Waiting()
    timed = replace(here, ulysses=TimedComm(here.ulysses, waiting), ring=TimedComm(here.ring, waiting))
    meter = Meter(job.shape, job.mesh.ranks // parts, here.device, waiting, job.peak_flops)
    held_out = _held_out(job, part, parts)
    batches = training_batches(job.data, tokenizer_of(job.described), part, parts)(kept["data"])
    for step, (batch, data) in enumerate(islice(batches, settings.steps - kept["step"]), kept["step"] + 1):
        meter.begin()
        did = train_step(trained, batch, timed, how)
        cost = meter.end([n for lengths in batch.lengths for n in lengths])
        figures = {"loss": did.loss, "grad_norm": did.grad_norm, "tokens": did.tokens, "lr": did.rate, **cost.figures()}
        figures["tokens_per_s"] = parts * cost.tokens / cost.seconds
        figures |= {f"data/{count}": n for count, n in left_out(data).items()}
        if held_out and (step == settings.steps or step % job.evaluation.every == 0):
            figures |= measured(trained, held_out, here, how, job)
        yield step, figures, data


def _held_out(job: Job, part: int, parts: int) -> list[Any]:
    from longctx.data.batches import training_batches
    from longctx.pretrained import tokenizer_of

    if not job.test:
        return []
    batches: Iterator[Any] = training_batches(job.test, tokenizer_of(job.described), part, parts)(None)
    return [batch for batch, _ in islice(batches, job.evaluation.batches)]


def measured(trained: Any, held_out: list[Any], here: Any, how: Any, job: Job) -> dict[str, float | None]:
    """Loss and perplexity of held-out text, over all of it and by position in the document."""
    from longctx.train.step import evaluate

    sums = evaluate(trained, held_out, here, how, job.evaluation.buckets)
    edges = [job.data.length * (i + 1) // job.evaluation.buckets for i in range(job.evaluation.buckets)]
    by_position = {
        f"eval/perplexity_to_{edge}": None if loss is None else math.exp(loss)
        for edge, loss in zip(edges, sums.means, strict=True)
    }
    return {"eval/loss": sums.mean, "eval/perplexity": math.exp(sums.mean), **by_position}


def show(job: Job, ended: dict[str, Any]) -> None:
    """How a run ended, and what to do with it."""
    table = Table(show_header=False, box=None)
    table.add_row("step", f"{ended['step']:,} of {job.settings.steps:,}, on {job.mesh}")
    table.add_row("loss", f"{ended['loss']:.4f}")
    table.add_row("figures", str(job.out / "metrics.jsonl"))
    table.add_row("checkpoint", ended["checkpoint"])
    table.add_row("to transformers", f"python -m recipes.export checkpoint={job.out} to={job.out}/hf")
    console.print(table)
