"""Quality against time saved, for dropped and rounded reductions on several links: what to take where.

python -m recipes.bench spd_tradeoff quality=quality/quality.json latency=[slow.json,loopback.json] picture=tradeoff.svg

It runs no model: it joins the results of spd_quality, of spd_latency on each link, and of eval.run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import expm1
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field, PositiveFloat
from rich.table import Table

from recipes.bench.spd_quality import IN_ORDER, RANKED
from recipes.common.cli import console, say, write_result
from recipes.common.places import read_json, refuse_unwritable
from recipes.common.plots import draw_tradeoff
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.spd_report import axes_of

PERPLEXITY, ACCURACY = "perplexity added, %", "accuracy lost, points"


@dataclass(frozen=True)
class TradeoffSettings:
    """Top-level settings of configs/bench/spd_tradeoff.yaml; ``limits`` are % of perplexity, or points of accuracy."""

    latency: Annotated[tuple[str, ...], Field(min_length=1)]
    quality: str | None = None
    text: str | None = None
    report: str | None = None
    phase: Literal["prefill", "decode"] = "prefill"
    limits: tuple[PositiveFloat, ...] = (1, 2, 5)
    out: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if not (self.quality or self.report):
            raise ValueError("there is no measure of quality: set quality=quality.json, report=report.json, or both")
        if self.text and not self.quality:
            raise ValueError(f"text={self.text} chooses a text of the quality file: set quality, or leave text out")


@dataclass(frozen=True)
class Quality:
    """A variant's cost: ``loss`` in the unit of ``measure``, `PERPLEXITY` or `ACCURACY`.

    ``name`` says how its blocks were repaired; ``reduce`` is the label of its rounded reductions, or float32.
    ``dropped`` is the share of blocks that drop a reduction.
    """

    measure: str
    name: str
    reduce: str
    dropped: float
    loss: float


@dataclass(frozen=True)
class TradeoffPoint:
    """A variant on one link: its quality, and the time ``saved`` there, in %."""

    link: str
    quality: Quality
    saved: float


@dataclass(frozen=True)
class TradeoffJob:
    """Everything read: the qualities, and for each link the time saved, in %, by rounded reduction and share."""

    settings: TradeoffSettings
    qualities: tuple[Quality, ...]
    saved: Mapping[str, Mapping[tuple[str, float], float]]


def prepare(config: DictConfig) -> TradeoffJob:
    """Read the files that ``config`` names.  Raises ValueError, with what to set instead, if they do not fit."""
    settings = top_level(config, TradeoffSettings)
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    saved, measured, rivals = {}, dict[str, tuple[str, int]](), dict[str, Mapping[str, Any]]()
    for file in settings.latency:
        values = read_result(file, "latency", ("rows", "model", "mesh"), "spd_latency")
        measured[f"latency={file}"] = values["model"], axes_of(values["mesh"]).get("tp", 1)
        rivals[f"latency={file}"] = values.get("rivals", {})
        link = link_of(values)
        if link in saved:
            raise ValueError(f"latency={list(settings.latency)}: two files are for {link}; give one for each link")
        table_rows = [row for row in values["rows"] if row["phase"] == settings.phase]
        saved[link] = {(row.get("reduce", "float32"), row["share"]): 100 * row["saved"] for row in table_rows}
    qualities = list[Quality]()
    if settings.quality:
        values = read_result(settings.quality, "quality", ("variants", "model", "tp"), "spd_quality")
        measured[f"quality={settings.quality}"] = values["model"], values["tp"]
        rivals[f"quality={settings.quality}"] = values.get("rivals", {})
        qualities += perplexities(values, settings.text)
    if settings.report:
        values = read_result(settings.report, "report", ("average", "variants"), "eval.run")
        tp = next(iter(measured.values()))[1]
        measured[f"report={settings.report}"] = next(iter(values["variants"].values()))["model"], tp
        qualities += accuracies(values, tp)
    refuse_other_model(measured)
    refuse_other_rivals(rivals)
    return TradeoffJob(settings, tuple(qualities), saved)


def read_result(file: str, setting: str, keys: Sequence[str], recipe: str) -> Any:
    """Return the content of ``file``.  Raises ValueError if it lacks one of ``keys``: ``recipe`` did not write it.

    Also raises ValueError if the file is damaged.
    """
    values = read_json(file, f"write it again with {recipe}", f"{setting}={file}")
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else keys
    if missing:
        raise ValueError(
            f"{setting}={file} is not a result of {recipe}, or of an older version: it has no {missing[0]}"
        )
    return values


def refuse_other_model(measured: Mapping[str, tuple[str, int]]) -> None:
    """Raise ValueError unless all files, by setting, are of the same (model, mesh.tp)."""
    (first, one), *others = measured.items()
    if different := [(setting, other) for setting, other in others if other != one]:
        setting, other = different[0]
        raise ValueError(
            f"{first} is of {one[0]} at mesh.tp={one[1]}, but {setting} of {other[0]} at mesh.tp={other[1]}: "
            "give files of the same model and degree"
        )


def refuse_other_rivals(rivals: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError unless a label means the same rounded reductions in all files; ``rivals`` are by setting."""
    known: dict[str, tuple[str, Any]] = {}
    for setting, by_label in rivals.items():
        for label, rival in by_label.items():
            first, one = known.setdefault(label, (setting, rival))
            if one != rival:
                raise ValueError(
                    f"{label} is {rival} in {setting}, but {one} in {first}: give different settings different labels"
                )


def link_of(values: Mapping[str, Any]) -> str:
    """Return the link of a result of spd_latency in words, such as "100mbit, 500 us"."""
    rate, latency_us = values["rate"], values.get("latency_us", 0)
    return f"{rate}, {latency_us:g} us" if latency_us else str(rate)


def perplexities(values: Mapping[str, Any], text: str | None) -> Iterator[Quality]:
    """Yield the quality of each variant and share in the ``values`` of quality.json, on the text labelled ``text``.

    Raises ValueError for an unknown ``text``, and for None if there are several.
    """
    texts = values["texts"]
    if text not in (texts if text or len(texts) > 1 else (None,)):
        raise ValueError(f"text={text} is not a text of the quality file: use one of {', '.join(texts)}")
    losses = texts[text or next(iter(texts))]["variants"]
    for name, variant in values["variants"].items():
        label = "not repaired" if variant["label"] == RANKED else variant["label"]
        if label != IN_ORDER:
            for share, loss in zip(values["dropped"], losses[name], strict=True):
                yield Quality(
                    PERPLEXITY, label, variant["reduce"], share, 100 * expm1(float(loss) - float(losses[RANKED][0]))
                )


def accuracies(values: Mapping[str, Any], tp: int) -> Iterator[Quality]:
    """Yield the quality of each variant in the ``values`` of eval's report.json: points of average accuracy lost.

    Variants with another number than ``tp`` of tensor-parallel ranks, or with context ranks, are left out and named;
    the baseline may have any mesh.  Raises ValueError for a report of an older version, and for a baseline that drops
    or rounds reductions.
    """
    if not values["average"]:
        raise ValueError("the report has no average of accuracies: evaluate a task that has accuracies")
    baseline = next(iter(values["variants"].values()))
    for name, variant in values["variants"].items():
        if "reduce" not in variant:
            raise ValueError("the report is of an older version: run eval.run again, which reuses the stored answers")
        if baseline["dropped"] or baseline["reduce"] != "float32":
            raise ValueError("the report's baseline drops or rounds reductions: evaluate the model without them first")
        axes = axes_of(variant["mesh"])
        if variant is not baseline and (axes.get("tp", 1) != tp or {*axes} - {"tp", "dp"}):
            say(f"left out, since the times are those of {tp} tensor-parallel ranks: {name} on {variant['mesh']}")
            continue
        difference = values["average"][name]["difference"] or 0.0
        repair = "repaired" if variant["repaired"] else "not repaired"
        yield Quality(ACCURACY, repair, variant["reduce"], variant["dropped"], 0.0 - 100 * difference)


def points_of(job: TradeoffJob) -> list[TradeoffPoint]:
    """Return a point for each link and quality whose time was measured there; without drops, repair changes nothing."""
    return [
        TradeoffPoint(link, quality, saved[quality.reduce, quality.dropped])
        for link, saved in job.saved.items()
        for quality in job.qualities
        if (quality.reduce, quality.dropped) in saved
    ]


def say_untimed(job: TradeoffJob) -> None:
    """Print, for each link, which reductions and shares have a quality but no time, and are therefore left out."""
    measured = {(quality.reduce, quality.dropped) for quality in job.qualities}
    for link, saved in job.saved.items():
        by_reduce: dict[str, list[str]] = {}
        for reduce, share in sorted(measured - set(saved)):
            by_reduce.setdefault(reduce, []).append(f"{100 * share:.3g} %")
        if by_reduce:
            untimed = "; ".join(f"{reduce} with {', '.join(shares)} dropped" for reduce, shares in by_reduce.items())
            say(f"left out, since the latency file of {link} has no time for them: {untimed}")


def best_within(points: Sequence[TradeoffPoint], limit: float) -> TradeoffPoint | None:
    """Return the point that saves most time among those that lose at most ``limit``; None if there is none."""
    return max((point for point in points if point.quality.loss <= limit), key=lambda point: point.saved, default=None)


def in_words(point: TradeoffPoint | None) -> str:
    """Return a point in words, such as "int8, 50 % dropped, repaired: saves 32.1 %, costs 1.2"."""
    if point is None:
        return "none"
    quality = point.quality
    repair = f", {quality.dropped:.0%} dropped, {quality.name}" if quality.dropped else ""
    return f"{quality.reduce}{repair}: saves {point.saved:.1f} %, costs {quality.loss:z.2f}"


def show(job: TradeoffJob, points: Sequence[TradeoffPoint]) -> None:
    """Print, for each measure, link and limit, the variant that saves most time."""
    for measure in dict.fromkeys(point.quality.measure for point in points):
        table = Table(
            f"{job.settings.phase}: {measure}", *(f"at most {limit:g}" for limit in job.settings.limits), box=None
        )
        for link in job.saved:
            of_link = [point for point in points if (point.link, point.quality.measure) == (link, measure)]
            table.add_row(link, *(in_words(best_within(of_link, limit)) for limit in job.settings.limits))
        console.print(table)


def draw(job: TradeoffJob, points: Sequence[TradeoffPoint], picture: str) -> None:
    """Draw quality over time saved to the file ``picture``: a panel for each link, a row of panels for each measure."""
    panels: dict[str, dict[str, dict[str, list[tuple[float, float, str]]]]] = {}
    for point in points:
        quality = point.quality
        series = f"{quality.reduce}, {quality.name}"
        place = panels.setdefault(quality.measure, {}).setdefault(point.link, {}).setdefault(series, [])
        place.append((point.saved, quality.loss, f"{quality.dropped:.0%}"))
    draw_tradeoff(picture, panels, x=f"time of {job.settings.phase} saved, %")


def task(config: DictConfig) -> None:
    """Join the files, print the best variants, and write and draw the points."""
    job = prepare(config)
    points = points_of(job)
    if not points:
        raise ValueError("no variant has both a quality and a time: give files of the same rivals and shares")
    say_untimed(job)
    show(job, points)
    if job.settings.out:
        table_rows = [{"link": point.link, **asdict(point.quality), "saved": point.saved} for point in points]
        write_result(job.settings.out, {"phase": job.settings.phase, "points": table_rows, **provenance()})
    if job.settings.picture:
        draw(job, points, job.settings.picture)
