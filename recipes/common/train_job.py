"""Job of a training run, checked before any rank starts."""

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from longctx import checkpoint_index
from longctx.config import DataSettings, Mesh, Optim, Recompute, Track
from longctx.data.identity import text_digests
from longctx.hf.checkpoint import same_model
from longctx.model_shape import ModelShape
from longctx.models.tensors import tensor_shapes
from recipes.common.cli import is_first
from recipes.common.hardware_file import read_hardware
from recipes.common.manifest import refuse_other_recipe
from recipes.common.places import nearest_existing, refuse_unwritable_folder
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import as_config, as_dict, section, top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES_PER_WEIGHT = 4 + 3 * 4  # the weight; in float32, the optimizer's copy and its two moments


@dataclass(frozen=True)
class TrainSettings:
    """Settings of configs/pretrain.yaml and extend.yaml outside any section."""

    out: str
    steps: PositiveInt = 100
    seed: NonNegativeInt = 0
    recompute: Recompute = "none"
    loss_rows: PositiveInt | None = 512
    mlp_rows: PositiveInt | None = None
    hardware: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out text: every ``every`` steps (0: never), on ``batches``, by ``buckets`` of position."""

    every: NonNegativeInt = 50
    batches: PositiveInt = 2
    buckets: PositiveInt = 4


@dataclass(frozen=True)
class Saving:
    """Checkpoints: one every ``every`` steps, the last ``keep`` kept."""

    every: PositiveInt = 50
    keep: PositiveInt = 2


@dataclass(frozen=True)
class TrainJob:
    """Inputs of every rank: plain values, checked before any rank starts.

    ``weights`` is the folder of the initial weights, None to draw them at random; ``target.folder`` has configuration
    and tokenizer.  ``test`` is the text to evaluate on (None: no evaluation).  ``samples`` show the first sequences as
    the model sees them: tokens, documents, start of the text.  ``peak_flops`` is a rank's, for MFU.
    """

    target: Target
    weights: Path | None
    data: DataSettings
    test: DataSettings | None
    optim: Optim
    track: Track
    evaluation: Evaluation
    saving: Saving
    settings: TrainSettings
    peak_flops: float | None
    config: Mapping[str, object]
    samples: tuple[tuple[int, int, str], ...]

    @property
    def out(self) -> Path:
        """Folder of the run, the setting ``out``."""
        return Path(self.settings.out)

    @cached_property
    def text_digests(self) -> list[list[str]]:
        """Digests of the files of each source of text; `begin_run` computes them once, for all ranks."""
        return text_digests(self.data.sources)

    @property
    def scratch(self) -> Path:
        """Hugging Face folder of the trained model without weights, written by `begin_run`."""
        return self.out / "model"


def resolve_train_job(config: DictConfig, recipe: str, *, from_scratch: bool) -> TrainJob:
    """Return the training job that ``config`` asks for; ``from_scratch`` draws the weights.  Writes nothing.

    Raises ValueError, with what to set instead, if it cannot be run.
    """
    from longctx.hf.config import refuse_untrainable, tokenizer_of

    # 1. The model, its mesh and how it runs.
    settings = top_level(config, TrainSettings)
    refuse_unwritable_folder(settings.out)
    refuse_other_recipe(settings.out, recipe)
    target = resolve_target(config, recipe, needs_weights=not from_scratch)
    _refuse_untrainable(target, settings)
    refuse_untrainable(target.folder)
    # 2. The text.
    tokenizer = tokenizer_of(target.folder)
    data, test = data_of(config)
    refuse_unsplit(target.mesh, target.shape, data)
    evaluation = section(config, "evaluate", Evaluation)
    if test and evaluation.every and evaluation.buckets > data.length:
        raise ValueError(f"evaluate.buckets={evaluation.buckets} is more than data.length={data.length}: use fewer")
    samples = first_sequences(data, tokenizer, target)
    if test and evaluation.every:
        first_sequences(test, tokenizer, target)
    # 3. The run; if its folder holds a run already, it must be one that this job can resume.
    weights = None if from_scratch else target.folder
    begun = f"weights {target.fingerprint}" if weights else f"seed={settings.seed}"
    dropped = [target.plan.tp, *target.plan.dropped] if target.plan else []
    job = TrainJob(
        target=target,
        weights=weights,
        data=data,
        test=test if evaluation.every else None,
        optim=section(config, "optim", Optim),
        track=section(config, "track", Track).of("train"),
        evaluation=evaluation,
        saving=section(config, "checkpoint", Saving),
        settings=settings,
        peak_flops=read_hardware(settings.hardware).peak_flops if settings.hardware else None,
        config={**provenance(), "machine": hardware(), **as_dict(config), "dropped": dropped, "begun": begun},
        samples=samples,
    )
    refuse_no_room(job)
    refuse_other_model(job)
    refuse_other_run(job)
    return job


def _refuse_untrainable(target: Target, settings: TrainSettings) -> None:
    if settings.mlp_rows and target.shape.mixture:
        raise ValueError(f"mlp_rows={settings.mlp_rows} is not built for mixtures of experts: use mlp_rows=null")
    if target.model.layers == "te":
        raise ValueError("model.layers=te has not been tested in training: use model.layers=local")
    if target.plan and target.plan.own_norms:
        raise ValueError(
            f"{target.folder} has separate norms per rank (repair.own_norms), which training does not support: "
            "adapt it without repair.own_norms"
        )
    if target.context.chunk:
        raise ValueError(
            f"context.chunk={target.context.chunk} is for inference: a training step takes whole sequences; use null"
        )


def first_sequences(
    data: DataSettings, tokenizer: "PreTrainedTokenizerBase", target: Target
) -> tuple[tuple[int, int, str], ...]:
    """Return the first batch's sequences, each as its number of tokens, of documents, and the start of its text.

    Raises ValueError for files that are missing or cannot be read, for text that does not fill one batch, for
    tokens beyond the model's vocabulary, and for a batch without a target.
    """
    from longctx.data.batches import refuse_nothing_to_learn, training_batches

    training_batches(data, tokenizer, 0, target.mesh.dp)  # raises unless data-parallel ranks get equal shares
    first = next(training_batches(data, tokenizer)(None), None)
    if first is None:
        raise ValueError(
            f"{', '.join(map(str, data.sources))}: the text does not fill a batch of data.batch={data.batch} sequences "
            f"of data.length={data.length}: use less of either, or more text"
        )
    target.shape.refuse_unknown_token(int(first[0].tokens.max()))
    refuse_nothing_to_learn(first[0].counted, f"{', '.join(map(str, data.sources))}: the first batch")
    rows = zip(first[0].tokens, first[0].lengths, strict=True)
    return tuple((len(ids), sum(n > 0 for n in each), tokenizer.decode(ids[:128].tolist())) for ids, each in rows)


def data_of(config: DictConfig) -> tuple[DataSettings, DataSettings | None]:
    """Return the training text, and the text to evaluate on, if there is one."""
    plain = as_config({"data": {k: v for k, v in as_dict(config.data).items() if k != "test"}})
    data, test = section(plain, "data", DataSettings), as_dict(config.data)["test"]
    if not test:
        return data, None
    held_out = as_config({"data": {"sources": test, "length": data.length, "batch": data.batch}})
    return data, replace(section(held_out, "data", DataSettings), end_token=data.end_token)


def refuse_unsplit(mesh: Mesh, shape: ModelShape, data: DataSettings) -> None:
    """Raise ValueError unless pipeline stages get equal numbers of layers, and sequences fit the model and the mesh."""
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


def begin_run(job: TrainJob) -> None:
    """Make the run's folder, and in it ``model``: the target's configuration and tokenizer without weights.

    Only the first rank does.  The folder ``model`` of a start that saved no checkpoint is replaced.
    """
    from longctx.hf.scratch import write_folder_like

    if not is_first():
        return
    _ = job.text_digests  # computed here, because the ranks would wait for it
    job.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.out, prefix=".model.") as work:
        write_folder_like(job.target.folder, {}, Path(work, "model"))
        if not is_model_kept(job):
            shutil.rmtree(job.scratch, ignore_errors=True)
        with suppress(OSError):  # made by an earlier start
            Path(work, "model").rename(job.scratch)


def is_model_kept(job: TrainJob) -> bool:
    """Return True if the run's folder has a ``model`` that must stay: of a saved checkpoint, or with weights."""
    has_checkpoint = checkpoint_index.checkpoint_folders(job.out / "checkpoints")
    return bool(has_checkpoint) or any(job.scratch.glob("*.safetensors"))


def refuse_other_model(job: TrainJob) -> None:
    """Raise ValueError if the run's folder holds a run of another model."""
    from longctx.hf.scratch import write_folder_like

    if not (job.scratch / "config.json").is_file() or not is_model_kept(job):
        return
    with tempfile.TemporaryDirectory() as work:
        write_folder_like(job.target.folder, {}, Path(work, "model"))
        files, existing = (
            {x.name: x.read_bytes() for x in each.iterdir() if x.is_file()}
            for each in (Path(work, "model"), job.scratch)
        )
    if files["config.json"] != existing["config.json"]:
        raise ValueError(f"out={job.out} has a run of another model, or of another context: give another folder")
    if changed := sorted(name for name in files.keys() | existing.keys() if files.get(name) != existing.get(name)):
        raise ValueError(
            f"out={job.out} has a run whose model has another {changed[0]}: use the model as it was, or another folder"
        )


def refuse_no_room(job: TrainJob) -> None:
    """Raise ValueError unless the disk has room for the checkpoints that the run will keep at once."""
    existing = len(checkpoint_index.checkpoint_folders(job.out / "checkpoints"))
    needed = weights_of(job.target.shape) * BYTES_PER_WEIGHT * max(1, job.saving.keep + 1 - existing)
    if (free := shutil.disk_usage(nearest_existing(job.out)).free) < needed:
        raise ValueError(
            f"out={job.out} has {free / 1e9:.2f} GB free, the checkpoints that are kept at once take "
            f"{needed / 1e9:.2f} GB more: use another disk, or a lower checkpoint.keep"
        )


def refuse_other_run(job: TrainJob) -> None:
    """Raise ValueError if the last checkpoint is beyond this run's steps, or is of a run with other settings."""
    place, _ = checkpoint_index.latest_whole(job.out / "checkpoints")
    if not place:
        return
    metadata = checkpoint_index.read_metadata(place)
    if metadata["step"] > job.settings.steps:
        raise ValueError(
            f"steps={job.settings.steps}, {place} is after step {metadata['step']}: use more steps, or another folder"
        )
    refuse_other_text(job, place, metadata)
    begun = metadata["config"].get("begun")
    if not same_model(str(begun), str(job.config["begun"])):
        raise ValueError(f"{place} began with {begun}, this is {job.config['begun']}: give another out=")
    now_dropped, was_dropped = job.config["dropped"], metadata["config"].get("dropped", [])
    if was_dropped != now_dropped:
        was_so = f"mesh.tp={was_dropped[0]} spd.blocks={was_dropped[1:]}" if was_dropped else "spd=none"
        raise ValueError(f"{place} was made with {was_so}: use that, or another out=")
    was = {"optim.zero1": metadata["config"]["optim"]["zero1"], "model.dtype": metadata["config"]["model"]["dtype"]}
    for name, now in (("optim.zero1", job.optim.zero1), ("model.dtype", job.target.model.dtype)):
        if was[name] != now:
            raise ValueError(f"{place} was made with {name}={str(was[name]).lower()}: use that, or another out=")


def refuse_other_text(job: TrainJob, place: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a file of text has changed since ``place`` was written; version 0.1 wrote no digests."""
    was: list[list[str]] | None = metadata.get("text")
    if was is None or not is_first() or was == job.text_digests:
        return
    pairs = zip(job.data.sources, was, job.text_digests, strict=False)
    changed = [source for source, before, now in pairs if before != now]
    name = f"the text of {changed[0]} has" if changed else "data.sources have"
    raise ValueError(f"{name} changed since {place} was written: restore it, or give another out= for a new run")


def weights_of(shape: ModelShape) -> int:
    """Return the number of weights of a model of ``shape``."""
    return sum(prod(size) for size in tensor_shapes(shape).values())
