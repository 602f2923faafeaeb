"""Files of a report: report.json for programs, report.md for people, a picture; and the same figures for W&B."""

import json
from dataclasses import replace
from pathlib import Path

from eval.stats.depths import PARTS
from eval.stats.lengths import EFFECTIVE
from eval.stats.page import markdown
from eval.stats.report import AVERAGE, Report, ScoredVariant
from longctx.text_file import write_text
from longctx.train.track import Tracker, to_json
from recipes.common.plots import draw_cells, draw_lines, draw_shares

_PICTURE = "accuracy"


def draw(report: Report, out: Path) -> tuple[str, ...]:
    """Draw average accuracy and milliseconds per token against the share of dropped blocks, as SVG and PNG in ``out``.

    Accuracies have the intervals of their differences from the baseline.  Returns the name of the SVG, for report.md.
    If no two variants differ in that share, draws and returns nothing.
    """
    variants = [variant for name, variant in report.variants.items() if name in report.average]
    if len({variant.dropped for variant in variants}) < 2:
        return ()
    base, drops = variants[0], [variant for variant in variants if variant.dropped]
    accuracy: dict[str, list[tuple[float, float, float, float]]] = {}
    latency: dict[str, list[tuple[float, float]]] = {}
    for variant in variants:
        # A variant without drops is the first point of all lines with its reductions and its mesh.
        alike = [one for one in drops if (one.reduce, one.mesh) == (variant.reduce, variant.mesh)]
        kinds = {_line_of(one, base) for one in ([variant] if variant.dropped else alike)}
        value, figures = report.average_accuracy(variant.name), report.average[variant.name]
        same = value - (figures["difference"] or 0.0)  # an accuracy without any loss
        point = variant.dropped, value, same + (figures["low"] or 0.0), same + (figures["high"] or 0.0)
        for kind in sorted(kinds):
            accuracy.setdefault(kind, []).append(point)
        is_plain = (variant.repaired, variant.reduce, variant.mesh) == (False, base.reduce, base.mesh)
        if variant.tokens_per_s and is_plain:
            latency.setdefault("time", []).append((variant.dropped, 1000 / variant.tokens_per_s))
    latency = {kind: points for kind, points in latency.items() if len(points) > 1}
    allowed = report.average_accuracy(next(iter(report.average))) - report.allowed_drop
    files = (f"{_PICTURE}.svg", f"{_PICTURE}.png")
    for file in files:
        draw_shares(
            str(out / file),
            accuracy,
            latency,
            title=report.origin["title"],
            x="blocks that drop their first reduction",
            y=("average accuracy", "milliseconds per token"),
            level=("allowed loss", allowed),
        )
    return files[:1]


def _line_of(variant: ScoredVariant, base: ScoredVariant) -> str:
    """Return the name of the line of ``variant``: repaired or not, and how its reductions and mesh differ."""
    differing = [getattr(variant, name) for name in ("reduce", "mesh") if getattr(variant, name) != getattr(base, name)]
    return ", ".join(["repaired" if variant.repaired else "not repaired", *differing])


def draw_lengths(report: Report, out: Path) -> tuple[str, ...]:
    """Draw the scores of generated tasks over their length as SVG in ``out``; nothing unless there are several lengths.

    Returns the name of the picture for report.md.
    """
    if not report.lengths:
        return ()
    series = {name: list(one.scores.values()) for name, one in report.lengths.items()}
    draw_lines(
        str(out / "lengths.svg"),
        list(next(iter(report.lengths.values())).scores),
        series,
        title=report.origin["title"],
        x="tokens",
        y="average score of the generated tasks",
        levels=[EFFECTIVE],
        ticks=list(next(iter(report.lengths.values())).scores),
        log_y=False,
    )
    return ("lengths.svg",)


def draw_depths(report: Report, out: Path) -> tuple[str, ...]:
    """Draw the scores of tasks that ask for one fact over depth and length as SVG in ``out``, if there are such tasks.

    Returns the name of the picture for report.md.
    """
    if not report.depths:
        return ()
    draw_cells(
        str(out / "depths.svg"),
        {name: one.scores for name, one in report.depths.items()},
        [f"{length:,}" for length in next(iter(report.depths.values())).lengths],
        [f"{part / PARTS:.0%} to {(part + 1) / PARTS:.0%}" for part in range(PARTS)],
        title=report.origin["title"],
        x="tokens",
        y="depth of the fact",
        z="average score",
    )
    return ("depths.svg",)


def write(report: Report, out: Path) -> Report:
    """Write pictures, report.json and report.md to the folder ``out``; return the report with its pictures' names."""
    report = replace(report, pictures=(*draw(report, out), *draw_lengths(report, out), *draw_depths(report, out)))
    write_text(out / "report.json", json.dumps(to_json(report.as_dict()), indent=1, allow_nan=False) + "\n")
    write_text(out / "report.md", markdown(report))
    return report


def track(report: Report, out: Path, tracker: Tracker) -> None:
    """Log averages (`average_accuracy`) and perplexities per word, and a table of all comparisons.

    Also logs the picture of shares if there is one.  Then finishes ``tracker``.  ``report`` is the result of `write`,
    and ``out`` the folder with its pictures.
    """
    columns = ["task", "variant", "n", "accuracy", "perplexity", "difference", "low", "high", "p_mcnemar", "verdict"]
    table_rows = [
        [task, name, *(figures.get(column) for column in columns[2:-1]), figures["verdict"] or ""]
        for task, by_variant in {**report.tasks, AVERAGE: report.average}.items()
        for name, figures in by_variant.items()
    ]
    perplexities = {
        f"eval/{name}/{task}": figures["perplexity"]
        for task, by_variant in report.tasks.items()
        for name, figures in by_variant.items()
        if "perplexity" in figures
    }
    tracker.log({f"eval/{name}": report.average_accuracy(name) for name in report.average} | perplexities, 0)
    tracker.table("eval/comparisons", columns, table_rows, 0)
    if f"{_PICTURE}.svg" in report.pictures:
        tracker.image(f"eval/{_PICTURE}", out / f"{_PICTURE}.png", 0)
    tracker.finish()
