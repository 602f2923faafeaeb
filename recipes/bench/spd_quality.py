"""Perplexity over the share of blocks that drop a reduction, zero-shot and repaired, on the same text in one run.

python -m recipes.bench spd_quality sensitivity=outputs/spd/sensitivity.json out=outputs/quality
"""

from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from longctx.config import DataSettings, TextSource
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, order_from, saved_plan, within
from longctx.spd.text import PackedText
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.plots import lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import sections
from recipes.common.spd_text import load_blocks, resolve_spd_target, text_of
from recipes.common.target import Target


@dataclass(frozen=True, kw_only=True)
class NamedText(TextSource):
    """An item of the setting ``texts``."""

    label: str


@dataclass(frozen=True)
class NamedModel:
    """An item of the setting ``models``: of recipes.spd_adapt."""

    label: str
    folder: str


@dataclass(frozen=True)
class QualityVariant:
    """A line of the picture: weights of ``folder``, blocks dropped in ``order``."""

    name: str
    folder: Path
    order: tuple[int, ...]
    own_norms: bool = False


@dataclass(frozen=True)
class QualityJob:
    """What every rank needs to know."""

    target: Target
    variants: tuple[QualityVariant, ...]
    shares: tuple[float, ...]
    texts: dict[str, PackedText]
    placement: tuple[int, ...]


def run_rank(rank: Rank, job: QualityJob) -> dict[str, Any]:
    """Mean losses (nats) by text: of each variant over the shares, and of each placement."""
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.spd.layer import follow_plan

    shape, tp = job.target.shape, job.target.mesh.tp
    found: dict[str, Any] = {name: {"variants": {}, "placement": {}} for name in job.texts}
    known: dict[Any, float] = {}
    with load_blocks(rank, job.target) as (_, blocks), Progress(shown=rank.rank == 0) as progress, torch.no_grad():
        progress.start("perplexities", len(job.texts) * len(job.variants) * len(job.shares))
        for variant in job.variants:
            for share in job.shares:
                plan = SPDPlan(shape.layers, tp, within(variant.order, share), variant.own_norms)
                follow_plan(blocks.model, plan)
                hf_load.load(blocks.model, hf_load.Weights(variant.folder, plan.dropped), shape)
                for name, text in job.texts.items():
                    same = (name, plan.dropped, variant.folder if plan.dropped else None)
                    if same not in known:
                        known[same] = mean_loss(blocks, text)
                    found[name]["variants"].setdefault(variant.name, []).append(known[same])
                    progress.step()
        follow_plan(blocks.model, SPDPlan(shape.layers, tp))  # first: the last plan's norms may be each rank's own
        hf_load.load(blocks.model, hf_load.Weights(job.target.folder), shape)
        progress.start("placements, blocks", len(job.placement) * len(job.texts))
        for name, text in job.texts.items():
            for block in job.placement:
                found[name]["placement"][block] = placements(blocks, text, block)
                progress.step()
    return found


def mean_loss(blocks: Any, text: PackedText) -> float:
    """Nats a token, as the model's blocks are set."""
    total = 0.0
    for begin in range(0, len(text), 4):
        some = text[slice(begin, begin + 4)]
        x = blocks.embed(some.tokens)
        for layer in blocks.model.decoder.layers:
            x = blocks.run(layer, x)
        total += blocks.loss(x, some)
    return total / int(text.mask.sum())


def placements(blocks: Any, text: PackedText, block: int) -> dict[str, float]:
    """Nats a token where ``block`` alone drops: Y and b where they belong, and where they do not (Table 1).

    This model has no bias: b is the mean of the attention's output, which each rank's part is centred by, so that the
    equations with a bias (4.1.2) are of the same block.
    """
    ways = ("as it should", "Y after the reduction", "b after, as it should", "b before the reduction")
    totals = dict.fromkeys(ways, 0.0)
    for begin in range(0, len(text), 4):
        some = text[slice(begin, begin + 4)]
        x = blocks.embed(some.tokens)
        for layer in blocks.model.decoder.layers[:block]:
            x = blocks.run(layer, x)
        for way, leaving in zip(ways, placed_outputs(blocks, blocks.model.decoder.layers[block], x), strict=True):
            last = leaving
            for layer in blocks.model.decoder.layers[block + 1 :]:
                last = blocks.run(layer, last)
            totals[way] += blocks.loss(last, some)
    return {way: total / int(text.mask.sum()) for way, total in totals.items()}


def placed_outputs(blocks: Any, layer: Any, x: Any) -> list[Any]:
    """What leaves ``layer`` in each of the four ways; of the second, every rank has another."""
    layer.drop(dropped=True)
    every = blocks.partials(layer, x)
    mine, whole = every[blocks.tp.rank], sum(every)
    bias = whole.mean((0, 1))
    centred = mine - mine.mean((0, 1))

    def mlp(u: Any) -> Any:
        return sum(blocks.tp.all_gather(part := blocks.mlp_of(layer, u), [tuple(part.shape)] * blocks.tp.size))

    z, z_biased = mlp(x + mine), mlp(x + centred + bias)
    layer.drop(dropped=False)
    with_bias = x + (whole - bias) + z_biased
    return [x + whole + z, x + z + mine, with_bias + bias, with_bias + blocks.tp.size * bias]


def variants_of(config: DictConfig, target: Target) -> tuple[QualityVariant, ...]:
    """The lines of the picture.  Raises ValueError for an adapted model that is not of this one."""
    layers, tp = target.shape.layers, target.mesh.tp
    order = order_from(Path(config.sensitivity).expanduser(), layers, tp, target.fingerprint)
    found = [
        QualityVariant("zero-shot, least sensitive first", target.folder, order),
        QualityVariant("zero-shot, first to last", target.folder, tuple(range(layers))),
    ]
    for name, folder in ((model.label, model.folder) for model in sections(config, "models", NamedModel)):
        saved = saved_plan(Path(folder).expanduser())
        if saved is None or saved.plan.tp != tp or saved.source != target.fingerprint:
            raise ValueError(f"models: {name}, {folder}, is not {target.model.name} adapted for mesh.tp={tp}")
        if missing := set(within(saved.order, max(config.shares))) - set(saved.adapted):
            raise ValueError(f"models: {name}, {folder}, lacks block {min(missing)}: adapt it with a larger spd.budget")
        found.append(QualityVariant(name, Path(folder).expanduser(), saved.order, saved.plan.own_norms))
    return tuple(found)


def texts_of(config: DictConfig, target: Target) -> dict[str, PackedText]:
    """The texts, by name."""
    data = {
        source.label: DataSettings((source,), config.length, batch=1, epochs=1, end_token=False)
        for source in sections(config, "texts", NamedText)
    }
    return {name: text_of(settings, target, config.sequences) for name, settings in data.items()}


def _refuse(config: DictConfig, target: Target) -> None:
    """ValueError for what would be measured wrongly, or twice."""
    if not config.shares or config.shares[0] != 0 or not all(0 <= share <= 1 for share in config.shares):
        raise ValueError(f"shares={list(config.shares)}: use shares of 0 to 1, first 0, what others are compared with")
    if wrong := [block for block in config.placement if not 0 <= block < target.shape.layers]:
        raise ValueError(f"placement: there is no block {wrong[0]}; the model's are 0 to {target.shape.layers - 1}")
    if target.mesh.dp > 1:
        raise ValueError(f"recipes.bench spd_quality has no use for mesh.dp={target.mesh.dp}: use mesh.dp=1")


def show(result: dict[str, Any]) -> None:
    """Perplexities over the shares, a table for each text."""
    for name, of_text in result["texts"].items():
        table = Table(f"{name}: blocks dropped", *(f"{share:.0%}" for share in result["shares"]), box=None)
        for variant, losses in of_text["variants"].items():
            table.add_row(variant, *(f"{exp(loss):.2f}" for loss in losses))
        console.print(table)
        for block, ways in of_text["placement"].items():
            told = ", ".join(f"{way} {exp(loss):.2f}" for way, loss in ways.items())
            console.print(f"block {block} alone: {told}")


def recovered(of_text: dict[str, Any], variant: str) -> list[float | None]:
    """Of what zero-shot loses in log perplexity, the part that ``variant`` wins back, share by share."""
    zero = of_text["variants"]["zero-shot, least sensitive first"]
    return [
        None if lost <= base + 1e-9 else (lost - now) / (lost - base)
        for base, lost, now in zip([zero[0]] * len(zero), zero, of_text["variants"][variant], strict=True)
    ]


def task(config: DictConfig) -> None:
    """Measure; write, draw and show."""
    warm_up_ranks(("longctx.infer.engine", "longctx.megatron.spd.blocks", "recipes.common.spd_text"))
    target = resolve_spd_target(config, "recipes.bench spd_quality")
    shares: list[float] = list(config.shares)
    _refuse(config, target)
    job = QualityJob(
        target, variants_of(config, target), tuple(shares), texts_of(config, target), tuple(config.placement)
    )
    found = on_ranks(target.mesh, run_rank, job)
    if found is None:
        return
    for of_text in found.values():
        of_text["recovered"] = {name: recovered(of_text, name) for name in (model.label for model in config.models)}
    result = {"model": target.model.name, "tp": target.mesh.tp, "shares": shares, "texts": found, **provenance()}
    show(result)
    write_result(str(Path(config.out, "quality.json")), result)
    for name, of_text in found.items():
        lines(
            str(Path(config.out, f"{name}.svg")),
            [100 * share for share in shares],
            {variant: [exp(loss) for loss in losses] for variant, losses in of_text["variants"].items()},
            title=f"{target.model.name} at TP={target.mesh.tp}, {name}",
            x="blocks that drop a reduction, %",
            y="perplexity",
            log_x=False,
        )
