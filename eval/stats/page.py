"""The report for people: report.md, and the table that a terminal shows."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from eval.stats.report import AVERAGE, Figures, Report
from eval.variants import BASELINE

_COMPARED = ["accuracy", "difference", "McNemar p", "verdict", "examples to decide"]


def markdown(report: Report) -> str:
    """Return the report as a page."""
    others = [name for name in report.variants if name != BASELINE]
    parts = [f"# {report.origin['title']}", *_gate(report, others), "## On average", _averages(report)]
    if report.pictures:
        parts.append("\n".join(f"![{Path(picture).stem}]({picture})" for picture in report.pictures))
    parts += _blocks(report)
    parts += ["## By task", _notes(report), _scores(report)]
    if others:
        parts += ["## Every comparison", _comparisons(report, others)]
    lines = [
        f"{name}: {report.origin[name]}" for name in ("command", "commit", "processor", "cores", "python", "torch")
    ]
    return "\n\n".join([*parts, "## How it was made", "```text\n" + "\n".join(lines) + "\n```"]) + "\n"


def summary(report: Report) -> Table:
    """Return a table of the averages, or of one model's scores by task, for a terminal."""
    if len(report.variants) == 1:
        table = Table("task", "examples", "accuracy", box=None)
        for task, by_variant in report.tasks.items():
            (figures,) = by_variant.values()
            table.add_row(task, f"{figures['n']:,}", _score(figures, digits=2))
        return table
    table = Table("variant", *_COMPARED, box=None)
    for name, figures in report.average.items():
        table.add_row(name, *_cells(figures))
    return table


def _gate(report: Report, others: Sequence[str]) -> list[str]:
    if not others:
        return []
    gate, drop = report.gate, f"{100 * report.allowed_drop:g} point(s)"
    parts = [f"Differences are paired, with 95 % intervals; no worse means: not by more than {drop}."]
    if gate.variants:
        verdict = "passed" if gate.passed else f"FAILED by {', '.join(gate.failed)}"
        undecided = [name for name in gate.variants if report.average[name]["verdict"] == "undecided"]
        if undecided and gate.passed:
            verdict += f", with {', '.join(undecided)} undecided (eval.strict=true fails then; more examples decide)"
        parts.append(f"**Gate** ({', '.join(gate.variants)}): {verdict}.")
    return parts


def _averages(report: Report) -> str:
    table_rows = []
    for name, variant in report.variants.items():
        cells = _cells(report.average[name]) if name in report.average else [""] * len(_COMPARED)
        speed = f"{variant.tokens_per_s:,.0f}" if variant.tokens_per_s else ""
        table_rows.append([name, f"{variant.dropped:.0%}", variant.mesh, *cells, speed])
    tasks = ", ".join(report.averaged) or "no task of accuracy"
    table = _table(["variant", "dropped", "mesh", *_COMPARED, "tokens/s"], table_rows)
    return f"The {AVERAGE} of {tasks}; each task has the same weight.\n\n{table}"


def _blocks(report: Report) -> list[str]:
    """Return the section that lists which blocks drop their reduction; empty if none does."""
    table_rows = [
        [name, ", ".join(map(str, variant.blocks))] for name, variant in report.variants.items() if variant.blocks
    ]
    if not table_rows:
        return []
    note = "Repaired models drop blocks in their own order: at the same share, other blocks may drop."
    return [
        "## Blocks",
        *([note] if any(variant.repaired for variant in report.variants.values()) else []),
        _table(["variant", "blocks that drop"], table_rows),
    ]


def _notes(report: Report) -> str:
    if not report.near_chance:
        return "Accuracy, or perplexity where the cell says so."
    is_left_out = set(report.near_chance).isdisjoint(report.averaged)
    return (
        f"Near chance{', and left out of the average' if is_left_out else ''}: {', '.join(report.near_chance)}. "
        "There the baseline is not better than guessing (one-sided exact test, 95 %): "
        "a difference says nothing about the variant."
    )


def _scores(report: Report) -> str:
    table_rows = []
    for task, by_variant in report.tasks.items():
        mark = " (near chance)" if task in report.near_chance else ""
        examples = next(iter(by_variant.values()))["n"]
        table_rows.append([task + mark, f"{examples:,}", *map(_score, by_variant.values())])
    return _table(["task", "examples", *report.variants], table_rows)


def _comparisons(report: Report, others: Sequence[str]) -> str:
    table_rows = []
    for task, by_variant in report.tasks.items():
        for name in others:
            figures = by_variant[name]
            if figures["accuracy"] is None:
                ends = "(few texts)" if figures["low"] is None else f"[{figures['low']:+.1%}, {figures['high']:+.1%}]"
                cells = [_score(figures), f"{figures['difference']:+.1%} {ends}", "", "", ""]
            else:
                cells = _cells(figures)
            table_rows.append([task, name, *cells])
    return _table(["task", "variant", *_COMPARED], table_rows)


def _score(figures: Figures, digits: int = 1) -> str:
    accuracy = figures["accuracy"]
    return f"perplexity {figures['perplexity']:.{digits}f}" if accuracy is None else f"{accuracy:.3f}"


def _cells(figures: Figures) -> list[str]:
    """Return the cells of `_COMPARED`; those of a baseline are empty after its accuracy."""
    accuracy, verdict = f"{figures['accuracy']:.3f}", figures["verdict"]
    if verdict is None:
        return [accuracy, "", "", "", ""]
    difference = f"{figures['difference']:+.3f} [{figures['low']:+.3f}, {figures['high']:+.3f}]"
    needed = f"{figures['needed']:,}" if figures["needed"] else ("beyond reach" if verdict == "undecided" else "")
    return [accuracy, difference, f"{figures['p_mcnemar']:.2g}", verdict, needed]


def _table(head: Sequence[str], table_rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *table_rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
