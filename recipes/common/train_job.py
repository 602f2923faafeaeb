"""Job of a training run, checked before any rank starts."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from longctx.config import Context, DataSettings, LoRA, Mesh, Optim, Recompute, Track
from longctx.cost.machine import Machine
from longctx.data.identity import text_digests
from longctx.model_shape import ModelShape
from recipes.common.hardware_file import read_rates, refuse_other_rates
from recipes.common.manifest import REPLACED_FILES, refuse_other_recipe
from recipes.common.places import refuse_folder_in_memory, refuse_unwritable_folder
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import as_config, as_dict, section, top_level
from recipes.common.target import Target, resolve_target
from recipes.common.train_resume import refuse_no_room, refuse_other_model, refuse_other_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainSettings:
    """Top-level settings of configs/pretrain.yaml, extend.yaml and finetune.yaml; comments there explain them."""

    out: str
    steps: PositiveInt = 100
    seed: NonNegativeInt = 0
    recompute: Recompute = "none"
    loss_rows: PositiveInt | None = 192
    mlp_rows: PositiveInt | None = None
    offload: str | None = None
    hardware: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out text: its interval ``every`` in steps (0: never), its number of ``batches``.

    Perplexity is also reported for each of ``buckets`` equal ranges of the position in a document.
    """

    every: NonNegativeInt = 50
    batches: PositiveInt = 2
    buckets: PositiveInt = 4


@dataclass(frozen=True)
class Saving:
    """Checkpoints: their interval ``every`` in steps, and the number of newest ones to ``keep``."""

    every: PositiveInt = 50
    keep: PositiveInt = 2


@dataclass(frozen=True)
class TrainJob:
    """Inputs of every rank: plain values, checked before any rank starts.

    ``weights`` is the folder of the initial weights, None to draw them at random; ``target.folder`` has configuration
    and tokenizer.  ``test`` is the text to evaluate on (None: no evaluation).  ``samples`` describes the sequences of
    the first batch (`first_sequences`).  ``peak_flops`` is the peak rate of a rank, for MFU.  ``machine`` is for
    predictions (None: ``hardware`` is not given, or has no constants for them).  ``config`` is saved with metrics and
    checkpoints.
    """

    target: Target
    weights: Path | None
    data: DataSettings
    test: DataSettings | None
    optim: Optim
    lora: LoRA
    track: Track
    evaluation: Evaluation
    saving: Saving
    settings: TrainSettings
    peak_flops: float | None
    machine: Machine | None
    config: Mapping[str, object]
    samples: tuple[tuple[int, int, str], ...]

    @property
    def out(self) -> Path:
        """Folder of the run, the setting ``out``."""
        return Path(self.settings.out)

    @cached_property
    def text_digests(self) -> list[list[str]]:
        """Digests of the files of each source of text; `train_resume.begin_run` computes them once, for all ranks."""
        return text_digests(self.data.sources)

    @property
    def scratch(self) -> Path:
        """Hugging Face folder of the trained model without weights, written by `train_resume.begin_run`."""
        return self.out / "model"


def resolve_train_job(config: DictConfig, recipe: str, *, from_scratch: bool, conversations: bool = False) -> TrainJob:
    """Return the checked training job that ``config`` asks for.  Writes nothing but the model cache.

    With ``from_scratch``, the run draws its weights at random and trains all of them.  ``conversations`` says whether
    the text must be conversations or must be plain text.  Raises ValueError, with what to set instead, if the job
    cannot be run.
    """
    from longctx.hf.config import refuse_untrainable, tokenizer_of

    # 1. The model, its mesh and how it runs.
    settings = top_level(config, TrainSettings)
    refuse_unwritable_folder(settings.out)
    refuse_other_recipe(settings.out, recipe, (*REPLACED_FILES, "model"))
    fp8 = () if recipe.startswith("recipes.bench") else ("block", "current")
    target = resolve_target(config, recipe, needs_weights=not from_scratch, proves_schedule=True, fp8=fp8)
    lora = LoRA() if from_scratch else section(config, "lora", LoRA)
    _refuse_untrainable(target, settings, recipe)
    refuse_offload(target, settings.offload, lora)
    if not from_scratch:
        refuse_no_adapters(target, settings, lora)
    refuse_untrainable(target.folder)
    # 2. The text.
    tokenizer = tokenizer_of(target.folder)
    data, test = data_of(config, conversations=conversations)
    refuse_unsplit(target.mesh, target.shape, data)
    evaluation = section(config, "evaluate", Evaluation)
    if test and evaluation.every and evaluation.buckets > data.length:
        raise ValueError(f"evaluate.buckets={evaluation.buckets} is more than data.length={data.length}: use fewer")
    samples = first_sequences(data, tokenizer, target)
    if test and evaluation.every:
        first_sequences(test, tokenizer, target)
    # 3. The run; if its folder holds a run already, it must be one that this job can resume.
    weights = None if from_scratch else target.folder
    peak_flops, machine = read_rates(settings.hardware) if settings.hardware else (None, None)
    begun = f"weights {target.fingerprint}" if weights else f"seed={settings.seed}"
    dropped = [target.plan.tp, *target.plan.dropped] if target.plan else []
    job = TrainJob(
        target=target,
        weights=weights,
        data=data,
        test=test if evaluation.every else None,
        optim=section(config, "optim", Optim),
        lora=lora,
        track=section(config, "track", Track).of("train"),
        evaluation=evaluation,
        saving=section(config, "checkpoint", Saving),
        settings=settings,
        peak_flops=peak_flops,
        machine=machine,
        config={**provenance(), "machine": hardware(), **as_dict(config), "dropped": dropped, "begun": begun},
        samples=samples,
    )
    refuse_no_room(job)
    refuse_other_model(job)
    refuse_other_run(job, tokenizer)
    return job


def _refuse_untrainable(target: Target, settings: TrainSettings, recipe: str) -> None:
    if not recipe.startswith("recipes.bench"):  # some benchmarks decode, too
        _refuse_decode(target)
    if target.reduce:
        raise ValueError(f"rounded reductions ({target.reduce}) are for inference: leave out reduce")
    if target.model.fp8 and settings.mlp_rows:
        raise ValueError(f"mlp_rows={settings.mlp_rows} is not tested with model.fp8: use mlp_rows=null")
    if settings.mlp_rows and target.shape.mixture:
        raise ValueError(f"mlp_rows={settings.mlp_rows} does not support mixtures of experts: use mlp_rows=null")
    if settings.hardware:
        refuse_other_rates(settings.hardware, target.model.dtype, "hardware=null, model.dtype=bfloat16")
    if target.plan and target.plan.own_norms:
        raise ValueError(
            f"{target.folder} has separate norms per rank (repair.own_norms), which training does not support: "
            "adapt it without repair.own_norms"
        )
    if target.context.chunk:
        raise ValueError(
            f"context.chunk={target.context.chunk} is for inference, and a training step takes whole sequences: use "
            "context.chunk=null"
        )


def _refuse_decode(target: Target) -> None:
    """Raise ValueError for ``context.decode``, unless it lets context ranks drop reductions in training."""
    decode = target.context.decode
    if decode != Context.decode and not (decode == "sharded" and target.plan):
        raise ValueError(f"context.decode={decode} is for inference: leave it out")


def refuse_offload(target: Target, where: str | None, lora: LoRA) -> None:
    """Raise ValueError unless ``where`` is null, ``host`` on a GPU with megatron-core's layers, or on a CPU a folder.

    `refuse_offload_folder` checks the folder.
    """
    if where is None:
        return
    on_cpu = target.run.device == "cpu"
    if where in ("", "none"):
        place = "FOLDER, on a disk" if on_cpu else "host"
        raise ValueError(f"offload={where} names no place: use offload={place}, or offload=null")
    if on_cpu:
        if where == "host":
            raise ValueError("offload=host is for GPUs: give a folder on a disk, or use offload=null")
        return
    may_be_te = target.model.layers == "te" or (target.model.layers == "auto" and not target.shape.mixture)
    fixes = [] if where == "host" else ["offload=host"]
    fixes += ["model.layers=local, since Transformer Engine is not tested"] if may_be_te and not lora.rank else []
    if fixes:
        raise ValueError(f"offload={where} on a GPU: use {' '.join(fixes)}")


def refuse_offload_folder(where: str | None) -> None:
    """Raise ValueError if ranks on this machine cannot offload activations to the folder ``where``.

    The folder must be writable and on a disk, not in memory (tmpfs); it need not exist yet.  None and "host" pass.
    """
    if where is None or where == "host":
        return
    if not hasattr(os, "posix_fadvise"):
        raise ValueError(f"offload={where} needs Linux: use offload=null and recompute=full")
    refuse_unwritable_folder(where, "offload")
    refuse_folder_in_memory(where, "offload")


def refuse_no_adapters(target: Target, settings: TrainSettings, lora: LoRA) -> None:
    """Raise ValueError if ``lora`` is set for a model, or together with a setting, that adapters do not support."""
    if lora.rank is None:
        return
    for is_so, what, instead in (
        (target.shape.mixture, "mixtures of experts", "lora.rank=null"),
        (target.model.layers == "te", "model.layers=te", "model.layers=local"),
        (target.plan and target.plan.dropped, "blocks that drop a reduction", "spd=none"),
        (settings.hardware, f"hardware={settings.hardware}: its times are for training all weights", "hardware=null"),
    ):
        if is_so:
            raise ValueError(f"lora.rank={lora.rank} is not supported with {what}; use {instead}")


def first_sequences(
    data: DataSettings, tokenizer: "PreTrainedTokenizerBase", target: Target
) -> tuple[tuple[int, int, str], ...]:
    """For each sequence of the first batch, return its numbers of tokens and documents, and the start of its text.

    Raises ValueError for

    * files that are missing or cannot be read, and text that does not fill one batch;
    * a batch that data-parallel ranks cannot share equally, or that has no target;
    * tokens beyond the model's vocabulary.
    """
    from longctx.data.batches import refuse_uneven_batch, training_batches
    from longctx.data.packing import refuse_nothing_to_learn

    refuse_uneven_batch(data.batch, target.mesh.dp)
    first = next(training_batches(data, tokenizer, ends=target.shape.end_tokens)(None), None)
    if first is None:
        if data.last == "pad":  # only sequences without a target are left out
            refuse_nothing_to_learn(0, ", ".join(map(str, data.sources)))
        raise ValueError(
            f"{', '.join(map(str, data.sources))}: the text does not fill a batch of data.batch={data.batch} sequences "
            f"of data.length={data.length}: use less of either, or more text"
        )
    target.shape.refuse_unknown_token(int(first[0].tokens.max()))
    refuse_nothing_to_learn(first[0].counted, f"{', '.join(map(str, data.sources))}: the first batch")
    rows = zip(first[0].tokens, first[0].documents, strict=True)
    return tuple((sum(each), len(each), tokenizer.decode(ids[: min(128, sum(each))].tolist())) for ids, each in rows)


def data_of(config: DictConfig, *, conversations: bool = False) -> tuple[DataSettings, DataSettings | None]:
    """Return the training text, and the text to evaluate on (None without data.test).

    Raises ValueError if ``data.conversations`` is set and ``conversations`` is false, or the other way round.
    """
    values = {name: value for name, value in as_dict(config.data).items() if name != "test"}
    if conversations != bool(values.get("conversations")):
        was = values.get("conversations") or "null"
        advice = "whole or split, or recipes.extend" if conversations else "null, or recipes.finetune"
        raise ValueError(f"data.conversations={was} does not fit this recipe: use {advice}")
    data, test = section(as_config({"data": values}), "data", DataSettings), as_dict(config.data)["test"]
    if not test:
        return data, None
    held_out = as_config({"data": {"sources": test, "length": data.length, "batch": data.batch}})
    test_data = section(held_out, "data", DataSettings)
    # Each held-out token counts once, however much text is asked for.
    test_data = replace(test_data, epochs=1, last="pad")
    return data, replace(test_data, end_token=data.end_token, on_error=data.on_error, conversations=data.conversations)


def refuse_unsplit(mesh: Mesh, shape: ModelShape, data: DataSettings) -> None:
    """Raise ValueError unless ``mesh.pp`` divides the layers, and ``data.length`` fits the model and the mesh.

    ``data.length`` may be at most the model's positions, and must be at least the number of context ranks.  With expert
    parallelism, each pipeline stage needs a layer with experts.  A router loss needs mesh.pp=1 and sequences without
    padding.
    """
    _refuse_router_loss(mesh, shape, data)
    if shape.layers % mesh.pp:
        fit = [n for n in range(1, shape.layers + 1) if shape.layers % n == 0]
        nearest = min(fit, key=lambda n: (abs(n - mesh.pp), n))
        raise ValueError(f"mesh.pp={mesh.pp} does not divide {shape.layers} layers: use mesh.pp={nearest}")
    per_stage = shape.layers // mesh.pp
    stages = [shape.experts[i : i + per_stage] for i in range(0, shape.layers, per_stage)]
    if mesh.ep > 1 and not all(any(stage) for stage in stages):
        raise ValueError(
            f"mesh.ep={mesh.ep} mesh.pp={mesh.pp}: all layers of a pipeline stage are dense, but with "
            "mesh.ep each stage needs a layer with experts: use mesh.pp=1"
        )
    if data.length > shape.max_positions:
        raise ValueError(
            f"data.length={data.length:,} is more than the model's context of {shape.max_positions:,}: "
            "use at most that, or another context (model.max_positions and a larger model.rope_theta, or "
            "model.rope_factor)"
        )
    if data.length < mesh.context:
        raise ValueError(
            f"data.length={data.length} is too short for {mesh.context} context ranks: use a larger "
            "data.length, or fewer ranks"
        )


def _refuse_router_loss(mesh: Mesh, shape: ModelShape, data: DataSettings) -> None:
    if not shape.mixture or not shape.mixture.router_loss:
        return
    without = "or output_router_logits=false in the model's config.json"
    if mesh.pp > 1:
        raise ValueError(
            f"mesh.pp={mesh.pp}: the router loss of this model needs the routers of all layers in one pipeline stage; "
            f"use mesh.pp=1, {without}"
        )
    for name, value, other in (("last", "pad", "drop"), ("conversations", "whole", "split")):
        if getattr(data, name) == value:
            raise ValueError(
                f"data.{name}={value}: the router loss of this model would count padding; use {other}, {without}"
            )
