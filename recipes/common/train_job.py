"""What a training run is asked to do, checked before any rank starts."""

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveInt

from longctx import checkpoint_index
from longctx.attention.backends import kernel_for
from longctx.config import Context, DataSettings, Mesh, ModelSource, Optim, Recompute, Track
from longctx.model_shape import ModelShape
from longctx.parallel.validate import refuse_unfit
from longctx.spd.plan import SPDPlan
from recipes.calibrate import hardware_from
from recipes.common.cli import section, top_level
from recipes.common.provenance import hardware, provenance
from recipes.common.spd_plan import plan_of

BYTES_OF_A_WEIGHT = 4 + 3 * 4  # itself, and in float32 the optimizer's copy and its two moments


@dataclass(frozen=True)
class TrainSettings:
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
class TrainJob:
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
    settings: TrainSettings
    peak_flops: float | None
    config: Mapping[str, Any]
    samples: tuple[tuple[int, int, str], ...]
    plan: SPDPlan | None = None

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def described(self) -> Path:
        """A Hugging Face folder without weights, of what is trained here; what an export begins with."""
        return self.out / "model"


def job_of(config: DictConfig, source: Path, weights: Path | None) -> TrainJob:
    """The job that ``config`` asks for, of ``source``'s model, beginning with ``weights`` or from scratch.

    Raises ValueError, with what to do instead, if it cannot be done.
    """
    from longctx.hf.checkpoint import fingerprint
    from longctx.hf.config import refuse_dropout, shape_of, tokenizer_of
    from longctx.parallel.strategy import STRATEGIES

    mesh, context = section(config, "mesh", Mesh), section(config, "context", Context)
    settings, model = top_level(config, TrainSettings), section(config, "model", ModelSource)
    refuse_unwritable_folder(settings.out)
    described = describe(source, Path(settings.out))
    refuse_dropout(described)
    shape, tokenizer = shape_of(described), tokenizer_of(described)
    data, test = data_of(config)
    if context.strategy not in STRATEGIES:
        raise ValueError(f"context.strategy={context.strategy} is for inference: use one of {', '.join(STRATEGIES)}")
    if model.layers == "te":
        raise ValueError("model.layers=te has not been tested in training: use model.layers=local")
    kernel_for(context.kernel, settings.device, model.dtype)
    refuse_unfit(mesh, shape)
    refuse_unsplit(mesh, shape, data)
    plan = plan_of(config, mesh, model, source, shape)
    if plan and plan.own_norms:
        raise ValueError(
            f"{source} has norms of each rank's own, which cannot be trained on: adapt it without repair.own_norms"
        )
    evaluation = section(config, "evaluate", Evaluation)
    if context.chunk:
        raise ValueError(f"context.chunk={context.chunk} is for inference: a training step takes its sequences whole")
    job = TrainJob(
        model=model,
        weights=weights,
        shape=shape,
        mesh=mesh,
        plan=plan,
        context=context,
        data=data,
        test=test if evaluation.every else None,
        optim=section(config, "optim", Optim),
        track=section(config, "track", Track).of("train"),
        evaluation=evaluation,
        saving=section(config, "checkpoint", Saving),
        settings=settings,
        peak_flops=hardware_from(settings.hardware).peak_flops if settings.hardware else None,
        config={
            **provenance(),
            "machine": hardware(),
            **_plain(config),
            "dropped": [plan.tp, *plan.dropped] if plan else [],
            "begun": f"weights {fingerprint(weights)}" if weights else f"seed={settings.seed}",
        },
        samples=first_of(data, tokenizer, mesh.dp),
    )
    if job.test:
        first_of(job.test, tokenizer, mesh.dp)
    refuse_no_room(job)
    refuse_other_run(job)
    return job


def first_of(data: DataSettings, tokenizer: Any, dp: int) -> tuple[tuple[int, int, str], ...]:
    """The first sequences as the model sees them: so many tokens, of so many documents, how the text begins.

    Raises ValueError for files that are not there or cannot be read, and for text that does not fill one batch.
    """
    from longctx.data.batches import training_batches

    training_batches(data, tokenizer, 0, dp)  # refuses ranks that would not be even
    first = next(training_batches(data, tokenizer)(None), None)
    if first is None:
        raise ValueError(
            f"{', '.join(map(str, data.sources))}: the text does not fill a batch of data.batch={data.batch} sequences "
            f"of data.length={data.length}: use less of either, or more text"
        )
    rows = zip(first[0].tokens, first[0].lengths, strict=True)
    return tuple((len(ids), sum(n > 0 for n in each), tokenizer.decode(ids[:128].tolist())) for ids, each in rows)


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
    if data.length > shape.max_positions:
        raise ValueError(
            f"data.length={data.length:,} is more than the model's context of {shape.max_positions:,}: "
            "use at most that, or another context (model.max_positions and a larger model.rope_theta, or "
            "model.rope_factor)"
        )
    if data.length < mesh.context:
        raise ValueError(
            f"data.length={data.length} for {mesh.context} context ranks: use a longer one, or fewer ranks"
        )


def refuse_unwritable_folder(out: str) -> None:
    """ValueError unless the folder ``out`` can be written; it is made."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}): give a folder of yours") from error


def describe(source: Path, out: Path) -> Path:
    """``out``/model: ``source`` without weights.

    Raises ValueError if a run of another model is there.
    """
    from longctx.hf.scratch import write_folder_like

    with tempfile.TemporaryDirectory(dir=out, prefix=".model.") as work:
        write_folder_like(source, {}, Path(work, "model"))
        wanted, there = (folder / "config.json" for folder in (Path(work, "model"), out / "model"))
        with suppress(OSError):  # it is there: made before, or just now by another rank that a launcher started
            Path(work, "model").rename(out / "model")
            return out / "model"
        if there.read_text() != wanted.read_text():
            raise ValueError(f"out={out} has a run of another model, or of another context: give another folder")
    return out / "model"


def refuse_no_room(job: TrainJob) -> None:
    """ValueError unless ``out`` has room for the checkpoints that will be there at once, beside those that are."""
    there = len(checkpoint_index.checkpoint_folders(job.out / "checkpoints"))
    needed = weights_of(job.shape) * BYTES_OF_A_WEIGHT * max(1, job.saving.keep + 1 - there)
    if (free := shutil.disk_usage(job.out).free) < needed:
        raise ValueError(
            f"out={job.out} has {free / 1e9:.2f} GB free, the checkpoints that will be there at once take "
            f"{needed / 1e9:.2f} more: use another disk, or a lower checkpoint.keep"
        )


def refuse_other_run(job: TrainJob) -> None:
    """ValueError if the checkpoint to go on from is further than this run, began otherwise, or has another form."""
    place, _ = checkpoint_index.latest_whole(job.out / "checkpoints")
    if not place:
        return
    told = checkpoint_index.read_metadata(place)
    if told["step"] > job.settings.steps:
        raise ValueError(
            f"steps={job.settings.steps}, {place} is behind step {told['step']}: use more, or another folder"
        )
    if (begun := told["config"].get("begun")) != job.config["begun"]:
        raise ValueError(f"{place} began with {begun}, this is {job.config['begun']}: give another out=")
    now_dropped, was_dropped = job.config["dropped"], told["config"].get("dropped", [])
    if was_dropped != now_dropped:
        was_so = f"mesh.tp={was_dropped[0]} spd.blocks={was_dropped[1:]}" if was_dropped else "spd=none"
        raise ValueError(f"{place} was made with {was_so}: go on with that, or elsewhere")
    was = {"optim.zero1": told["config"]["optim"]["zero1"], "model.dtype": told["config"]["model"]["dtype"]}
    for name, now in (("optim.zero1", job.optim.zero1), ("model.dtype", job.model.dtype)):
        if was[name] != now:
            raise ValueError(f"{place} was made with {name}={str(was[name]).lower()}: go on with that, or elsewhere")


def weights_of(shape: ModelShape) -> int:
    """Weights of a model of ``shape``, to within its norms and biases."""
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return shape.layers * shape.hidden * (heads + 3 * shape.ffn) + (2 - shape.tied) * shape.vocab_size * shape.hidden
