"""Perplexity by the share of blocks that drop a reduction, and with rounded reductions, on the same text in one run.

python -m recipes.bench spd_quality sensitivity=outputs/spd/sensitivity.json out=outputs/quality
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import expm1
from pathlib import Path
from typing import Annotated

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import DataSettings, Reduce, TextSource
from longctx.hf.checkpoint import same_model
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.perplexity import difference_interval, perplexity
from longctx.shapes import Tensor
from longctx.spd.plan import SavedPlan, SPDPlan, order_from, refuse_changed_weights, saved_plan, within
from longctx.spd.text import PackedText
from recipes.bench.rounded import Rival, read_rivals
from recipes.bench.spd_placement import placement_losses
from recipes.bench.text_losses import mean_loss, sequence_losses
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.plots import draw_lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.spd_loop import load_blocks
from recipes.common.spd_text import resolve_spd_target, text_of
from recipes.common.target import Target, refuse_damaged

RANKED = "zero-shot, least sensitive first"
IN_ORDER = "zero-shot, first to last"


@dataclass(frozen=True, kw_only=True)
class NamedText(TextSource):
    """An item of the setting ``texts``; ``label`` names its results and its picture."""

    label: str


@dataclass(frozen=True)
class NamedModel:
    """An item of the setting ``models``: a folder written by recipes.spd_adapt."""

    label: str
    folder: str


@dataclass(frozen=True)
class QualitySettings:
    """Top-level settings of configs/bench/spd_quality.yaml, other than its lists of items."""

    sensitivity: str
    out: str
    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0, 0.25, 0.5, 0.75, 1)
    length: PositiveInt = 256
    sequences: PositiveInt = 8
    placement: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        if self.shares[0] != 0:
            raise ValueError(f"shares={list(self.shares)} does not begin with the baseline: put 0 first")


@dataclass(frozen=True)
class QualityVariant:
    """A line of the picture: the weights in ``folder``, which ``label`` names, with blocks dropped in ``order``.

    ``own_norms`` is that of the `SPDPlan`.  ``rival`` has the rounded reductions (None: exact ones).
    """

    label: str
    folder: Path
    order: tuple[int, ...]
    own_norms: bool = False
    rival: Rival | None = None

    @property
    def name(self) -> str:
        """Name of the line: ``label``, and after a comma that of the ``rival``."""
        return f"{self.label}, {self.rival.label}" if self.rival else self.label


@dataclass(frozen=True)
class QualityJob:
    """The inputs of every rank; ``texts`` by label."""

    settings: QualitySettings
    target: Target
    variants: tuple[QualityVariant, ...]
    texts: dict[str, PackedText]

    @property
    def repaired(self) -> list[str]:
        """Names of the variants that are repaired models."""
        return [variant.name for variant in self.variants if variant.folder != self.target.folder]


@dataclass(frozen=True)
class TextLosses:
    """Mean losses (nats per token) on one text.

    ``variants[name]`` lists the loss at each share.  ``placement[block]`` maps each of `PLACEMENTS` to the loss with
    only that block dropped.

    ``intervals[name]`` lists, for each share, the 95 % interval (low, high) of the loss that the variant adds to the
    baseline, which drops and rounds nothing.  With one sequence, the intervals are None.
    """

    variants: dict[str, list[float]]
    placement: dict[int, dict[str, float]]
    intervals: dict[str, list[tuple[float, float] | None]]


def prepare(config: DictConfig) -> QualityJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    lists = ("models", "texts", "rivals")
    plain = as_config({name: value for name, value in as_dict(config).items() if name not in lists})
    settings = top_level(plain, QualitySettings)
    target = resolve_spd_target(config, "recipes.bench spd_quality")
    last = target.shape.layers - 1
    if wrong := [block for block in settings.placement if not 0 <= block <= last]:
        raise ValueError(f"placement={list(settings.placement)}: there is no block {wrong[0]}; use blocks 0 to {last}")
    if target.mesh.dp > 1:
        raise ValueError(f"recipes.bench spd_quality has no use for mesh.dp={target.mesh.dp}: use mesh.dp=1")
    models = sections(config, "models", NamedModel, say)
    refuse_same_labels("models", [RANKED, IN_ORDER, *(model.label for model in models)])
    refuse_unplaceable(settings, target.shape)
    rivals = read_rivals(config)
    texts = read_texts(sections(config, "texts", NamedText, say), target, settings)
    variants = resolve_variants(models, rivals, target, settings)
    return QualityJob(settings, target, variants, texts)


def refuse_unplaceable(settings: QualitySettings, shape: ModelShape) -> None:
    """Raise ValueError if ``placement`` is asked for a model whose block adds more than its two outputs.

    The four sums of `placed_outputs` have no norms of outputs, no scale of the residual connection, and no biases.
    """
    if settings.placement and (shape.norms != "pre" or shape.residual_scale != 1 or shape.out_bias or shape.mlp_bias):
        raise ValueError(
            f"placement={list(settings.placement)} is for blocks that add the outputs of attention and MLP unchanged, "
            "without norms, scale or biases: use placement=[]"
        )


def resolve_variants(
    models: tuple[NamedModel, ...], rivals: tuple[Rival, ...], target: Target, settings: QualitySettings
) -> tuple[QualityVariant, ...]:
    """Return the variants: two without repair and one per repaired model, then the same with each rival.

    The first variant without repair drops the least sensitive blocks first.  The second drops blocks from the first
    layer to the last, and has no rival.

    Raises ValueError as `saved_plan_of` does for each model, and as `order_from` does for the file of sensitivities.
    """
    layers, tp = target.shape.layers, target.mesh.tp
    order = order_from(Path(settings.sensitivity).expanduser(), layers, tp, target.fingerprint)
    variants = [
        QualityVariant(RANKED, target.folder, order),
        QualityVariant(IN_ORDER, target.folder, tuple(range(layers))),
    ]
    for model in models:
        name = f"models: {model.label} ({model.folder})"
        saved = saved_plan_of(name, model.folder, target, max(settings.shares))
        folder = Path(model.folder).expanduser()
        variants.append(QualityVariant(model.label, folder, saved.order, saved.plan.own_norms))
    rounded = [replace(one, rival=rival) for rival in rivals for one in variants if one.label != IN_ORDER]
    return (*variants, *rounded)


def saved_plan_of(name: str, folder: str, target: Target, share: float) -> SavedPlan:
    """Return the plan of an adapted ``folder``.

    Raises ValueError, naming ``name``, unless the folder was adapted from the target at its mesh.tp, with enough
    repaired blocks to drop ``share`` of all.  Also raises it if the folder lacks weights or has unknown ones.
    """
    path, tp = Path(folder).expanduser(), target.mesh.tp
    saved = saved_plan(path)
    if saved is None or saved.plan.tp != tp or not same_model(saved.source, target.fingerprint):
        raise ValueError(
            f"{name} is not a folder of recipes.spd_adapt for {target.model.name} and mesh.tp={tp}: run it with these, "
            "and give its out"
        )
    if missing := set(within(saved.order, share)) - set(saved.adapted):
        raise ValueError(f"{name} lacks a repair of block {min(missing)}: adapt it with a larger spd.budget")
    refuse_damaged(target.model, path, target.shape)
    refuse_changed_weights(path)
    return saved


def read_texts(texts: tuple[NamedText, ...], target: Target, settings: QualitySettings) -> dict[str, PackedText]:
    """Return the packed sequences of each text, by its label.

    Raises ValueError as `text_of` and `refuse_bad_labels` do.
    """
    refuse_bad_labels([text.label for text in texts])
    data = {text.label: DataSettings((text,), settings.length, batch=1, epochs=1, end_token=False) for text in texts}
    return {
        label: text_of(source, target, settings.sequences, length_setting="length") for label, source in data.items()
    }


def refuse_same_labels(setting: str, labels: Sequence[str]) -> None:
    """Raise ValueError if two items of the list ``setting`` have the same label."""
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{setting}: the label {repeated[0]!r} is used twice: give each item a label of its own")


def refuse_bad_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless there is a text, and the ``labels`` of all texts differ and can be names of files."""
    refuse_same_labels("texts", labels)
    if not labels or any("/" in label for label in labels):
        raise ValueError(f"texts have the labels {list(labels)}: give one text or more, each with a label without /")


def run_rank(rank: Rank, job: QualityJob) -> dict[str, TextLosses]:
    """Return the losses of each text, by its label: of all variants and shares, and of all placements."""
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.reduce import set_reductions
    from longctx.megatron.spd.layer import follow_plan

    shape, tp, settings = job.target.shape, job.target.mesh.tp, job.settings
    losses = {label: TextLosses({}, {}, {}) for label in job.texts}
    known: dict[tuple[object, ...], Tensor] = {}
    with load_blocks(rank, job.target) as (_, blocks), Progress(shown=rank.rank == 0) as progress, torch.no_grad():
        # 1. Variants: load the weights that go with the plan, unless the losses of the same weights are known.
        progress.start("perplexities", len(job.texts) * len(job.variants) * len(settings.shares))
        for variant in job.variants:
            for share in settings.shares:
                plan = SPDPlan(shape.layers, tp, within(variant.order, share), variant.own_norms)
                follow_plan(blocks.model, plan)
                set_reductions(blocks.model, blocks.tp, variant.rival or Reduce())
                hf_load.load(blocks.model, hf_load.Weights(variant.folder, plan.dropped), shape)
                for label, text in job.texts.items():
                    # Without dropped blocks every folder holds the same weights.
                    key = (label, plan.dropped, variant.folder if plan.dropped else None, variant.rival)
                    if key not in known:
                        known[key] = sequence_losses(blocks, text)
                    losses[label].variants.setdefault(variant.name, []).append(mean_loss(known[key], text))
                    base, lengths = known[label, (), None, None], text.mask.sum(1)
                    _, low, high = difference_interval(base.tolist(), known[key].tolist(), lengths.tolist())
                    interval = (low, high) if len(text) > 1 else None
                    losses[label].intervals.setdefault(variant.name, []).append(interval)
                    progress.step()
        # 2. Placements: the model's own weights.  Follow its plan first, since the last plan may have norms per rank.
        follow_plan(blocks.model, SPDPlan(shape.layers, tp))
        set_reductions(blocks.model, blocks.tp, Reduce())
        hf_load.load(blocks.model, hf_load.Weights(job.target.folder), shape)
        progress.start("placements, blocks", len(settings.placement) * len(job.texts))
        for label, text in job.texts.items():
            for block in settings.placement:
                losses[label].placement[block] = placement_losses(blocks, text, block)
                progress.step()
    return losses


def compute_recovery(losses: TextLosses, variant: str) -> list[float | None]:
    """Return, for each share of dropped blocks, the part of zero-shot's added log perplexity that ``variant`` avoids.

    1 means that ``variant`` equals the model without dropped blocks, 0 that it equals the zero-shot model.  The result
    is None where dropping without repair adds nothing.
    """
    zero_shot = losses.variants[RANKED]
    base = zero_shot[0]
    return [
        None if lost <= base + 1e-9 else (lost - now) / (lost - base)
        for lost, now in zip(zero_shot, losses.variants[variant], strict=True)
    ]


def show(losses: dict[str, TextLosses], shares: tuple[float, ...]) -> None:
    """Print, for each text, the perplexities by share, with intervals of what is added.

    Below them are the perplexities with one dropped block, by name of placement (`TextLosses.placement`).
    """
    for label, of_text in losses.items():
        table = Table(f"{label}: blocks dropped", *(f"{share:.0%}" for share in shares), box=None)
        for variant, of_shares in of_text.variants.items():
            table.add_row(variant, *(f"{perplexity(loss):.2f}" for loss in of_shares))
            table.add_row("  added, %", *map(interval_in_words, of_text.intervals[variant]))
        console.print(table)
        for block, of_placements in of_text.placement.items():
            words = ", ".join(f"{placement} {perplexity(loss):.2f}" for placement, loss in of_placements.items())
            console.print(f"block {block} alone: {words}")


def interval_in_words(added: tuple[float, float] | None) -> str:
    """Return an interval of the added loss as one of the added perplexity, in percent; an empty text for None."""
    return "" if added is None else f"{100 * expm1(added[0]):+.2f} to {100 * expm1(added[1]):+.2f}"


def draw(losses: dict[str, TextLosses], job: QualityJob) -> None:
    """Draw perplexity against the share of dropped blocks, one picture LABEL.svg per text, in the folder ``out``."""
    target, settings = job.target, job.settings
    for label, of_text in losses.items():
        draw_lines(
            str(Path(settings.out, f"{label}.svg")),
            [100 * share for share in settings.shares],
            {variant: [perplexity(loss) for loss in of_shares] for variant, of_shares in of_text.variants.items()},
            title=f"{target.model.name} at TP={target.mesh.tp}, {label}",
            x="blocks that drop a reduction, %",
            y="perplexity",
            log_x=False,
        )


def task(config: DictConfig) -> None:
    """Run the ranks, then show, write and draw the losses."""
    warm_up_ranks(("longctx.infer.engine", "longctx.megatron.spd.blocks", "recipes.common.spd_loop"))
    job = prepare(config)
    losses = on_ranks(job.target.mesh, run_rank, job)
    if losses is None:
        return
    texts = {
        label: {**asdict(of_text), "recovered": {name: compute_recovery(of_text, name) for name in job.repaired}}
        for label, of_text in losses.items()
    }
    show(losses, job.settings.shares)
    shares, layers = job.settings.shares, job.target.shape.layers
    dropped = [len(within(range(layers), share)) / layers for share in shares]
    inputs = {"model": job.target.model.name, "tp": job.target.mesh.tp, "shares": shares, "dropped": dropped}
    inputs["variants"] = {
        one.name: {"label": one.label, "reduce": one.rival.label if one.rival else "float32"} for one in job.variants
    }
    inputs["rivals"] = {one.rival.label: one.rival.settings for one in job.variants if one.rival}
    write_result(str(Path(job.settings.out, "quality.json")), {**inputs, "texts": texts, **provenance()})
    draw(losses, job)
