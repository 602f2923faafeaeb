"""The report for people: report.md, and the table that a terminal shows."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path

from rich.table import Table

from eval.stats.compare import SCREENED, decide
from eval.stats.depths import PARTS
from eval.stats.lengths import EFFECTIVE
from eval.stats.report import AVERAGE, Figures, Report
from eval.stats.sequential import LOOKS
from eval.variants import BASELINE

_UNDECIDABLE = "not with these sets"
_ROUNDING = 1e-9  # a difference up to this may be 0, but for the rounding of sums
_COMPARED = ["accuracy", "difference", "McNemar p", "verdict", "examples to decide"]


def markdown(report: Report) -> str:
    """Return ``report`` as a page of Markdown."""
    others = [name for name in report.variants if name != BASELINE]
    parts = [f"# {report.origin['title']}", *_gate(report, others), "## On average", _averages(report)]
    if report.pictures:
        parts.append("\n".join(f"![{Path(picture).stem}]({picture})" for picture in report.pictures))
    parts += [*_needs(report), *_margins(report, others), *_blocks(report)]
    parts += [*_lengths(report), *_depths(report)]
    parts += ["## By task", _notes(report), _scores(report)]
    if others:
        parts += ["## Every comparison", _comparisons(report, others)]
    lines = [
        f"{name}: {report.origin[name]}" for name in ("command", "commit", "processor", "cores", "python", "torch")
    ]
    return "\n\n".join([*parts, "## How it was made", "```text\n" + "\n".join(lines) + "\n```"]) + "\n"


def summary(report: Report) -> Table:
    """Return a table for a terminal: the averages, or the scores by task if there are no variants or no averages."""
    if len(report.variants) == 1:
        table = Table("task", "examples", "accuracy", box=None)
        for task, by_variant in report.tasks.items():
            (figures,) = by_variant.values()
            table.add_row(task, f"{figures['n']:,}", _score(figures, digits=2))
        return table
    if not report.average:
        table = Table("task", "variant", *_COMPARED, box=None)
        for cells in _compared(report, list(report.variants)):
            table.add_row(*cells)
        return table
    table = Table("variant", *_COMPARED, box=None)
    for name, figures in report.average.items():
        table.add_row(name, *_cells(figures, report.average[BASELINE], report.allowed_drop))
    return table


def _gate(report: Report, others: Sequence[str]) -> list[str]:
    if not others:
        return []
    gate, drop = report.gate, f"{100 * report.allowed_drop:g} point(s)"
    if not report.average:
        return ["Differences are paired, with 95 % intervals. Perplexities have no verdict."]
    parts = [
        "Differences are paired, with 95 % intervals, which decide the verdicts. "
        f"No worse means that even the lower end of the interval is a loss below {drop}."
    ]
    if report.sequential:
        parts.append(
            f"Examples were added until the verdicts were reached, in at most {LOOKS} looks. The intervals are wider "
            "than for one look, so that all looks together are wrong in at most 5 % of cases."
        )
    if gate.variants:
        failed = [f"{name} ({report.average[name]['verdict']})" for name in gate.failed]
        verdict = f"FAILED by {', '.join(failed)}" if failed else "passed"
        undecided = [name for name in gate.variants if report.average[name]["verdict"] == "undecided"]
        if undecided and gate.strict and not set(report.averaged).isdisjoint(report.near_chance):
            verdict += ". The baseline guesses on every task: use other tasks"
        elif undecided and gate.strict:
            verdict += ". Undecided is not passed: ask more examples, or let it pass with eval.strict=false"
        elif undecided:
            verdict += f", with {', '.join(undecided)} undecided, which eval.strict=false lets pass"
        parts.append(f"**Gate** ({', '.join(gate.variants)}): {verdict}.")
    return parts


def _averages(report: Report) -> str:
    table_rows, base = [], report.average.get(BASELINE)
    for name, variant in report.variants.items():
        cells = [""] * len(_COMPARED)
        if name in report.average:
            cells = _cells(report.average[name], base, report.allowed_drop)
        speed = f"{variant.tokens_per_s:,.0f}" if variant.tokens_per_s else ""
        table_rows.append([name, f"{variant.dropped:.0%}", variant.mesh, *cells, speed])
    tasks = ", ".join(report.averaged)
    words = f"The {AVERAGE} of {tasks}; each task has the same weight." if tasks else "No task has accuracies."
    table = _table(["variant", "dropped", "mesh", *_COMPARED, "tokens/s"], table_rows)
    notes = [f"* {line}" for line in verdicts_on_one_task(report)]
    return "\n\n".join([words, table, *notes])


def verdicts_on_one_task(report: Report) -> list[str]:
    """Return a sentence for each variant whose verdict would differ without one of the averaged tasks."""
    lines = []
    for name, figures in report.average.items():
        others = [f"without {task} ({verdict})" for task, verdict in figures.get("rests_on", {}).items()]
        if others:
            lines.append(f"The verdict on {name} would be another one {' or '.join(others)}.")
    return lines


def _needs(report: Report) -> list[str]:
    """Return the section that says how many examples would decide the averages; empty if all are decided."""
    undecided = {name: one for name, one in report.average.items() if one["verdict"] == "undecided"}
    if not undecided or not set(report.averaged).isdisjoint(report.near_chance):  # guesses: no number would decide
        return []
    table_rows = []
    for name, figures in undecided.items():
        needed = figures["needed"]
        cells = [f"{needed[task]:,}" for task in report.averaged] if needed else [_UNDECIDABLE] * len(report.averaged)
        table_rows.append([name, *cells])
    outcomes = next(iter(report.variants.values())).outcomes
    sizes = [outcomes[task].available for task in report.averaged]
    table_rows.append(["in the set", *("any number" if size is None else f"{size:,}" for size in sizes)])
    note = (
        "With these numbers of examples, a verdict is reached in 80 % of cases if the variant loses nothing. If the "
        "loss here is above the allowed drop, the numbers hold for a loss of twice that drop. The closer the true loss "
        "is to the allowed drop, the more examples are needed. eval.until=decided adds examples until the verdict."
    )
    return ["## Examples to decide", note, _table(["variant", *report.averaged], table_rows)]


def _margins(report: Report, others: Sequence[str]) -> list[str]:
    """Return the section on log-probability margins of the variants ``others``; empty if no task has margins."""
    table_rows = []
    for name in others:
        margin = report.average.get(name, Figures()).get("margin")
        if margin:
            by_task = [report.tasks[task][name].get("margin") for task in report.averaged]
            table_rows.append([name, _margin(margin), *(_margin(one) if one else "" for one in by_task)])
    if not table_rows:
        return []
    note = (
        "A second measure, which no verdict and no gate uses. The margin is the log-probability of the right answer "
        "minus the largest of the others; the table has its change in nats. It can change before any answer changes."
    )
    return ["## Margin of the right answer", note, _table(["variant", AVERAGE, *report.averaged], table_rows)]


def _margin(margin: Mapping[str, float | None]) -> str:
    """Return a table cell with the difference ``margin`` of log-probability margins (nats) and its interval."""
    low, high = margin["low"], margin["high"]
    ends = "(few examples)" if low is None or high is None else f"[{low:+z.3f}, {high:+z.3f}]"
    return f"{margin['difference']:+z.3f} {ends}"


def _blocks(report: Report) -> list[str]:
    """Return the section that lists which blocks drop their reduction; empty if none does."""
    table_rows = [
        [name, ", ".join(map(str, variant.blocks))] for name, variant in report.variants.items() if variant.blocks
    ]
    if not table_rows:
        return []
    note = "A repaired model drops blocks in its own order, so at the same share it may drop other blocks."
    return [
        "## Blocks",
        *([note] if any(variant.repaired for variant in report.variants.values()) else []),
        _table(["variant", "blocks that drop"], table_rows),
    ]


def _lengths(report: Report) -> list[str]:
    """Return the section of scores by length; empty unless generated tasks have several lengths."""
    if not report.lengths:
        return []
    lengths = next(iter(report.lengths.values())).scores
    table_rows = [
        [name, *(f"{score:.3f}" for score in one.scores.values()), f"{one.effective:,}" if one.effective else "none"]
        for name, one in report.lengths.items()
    ]
    words = f"The average of the generated tasks; effective is the longest length up to which it is {EFFECTIVE:.1%}"
    return [
        "## By length",
        f"{words} or more, Llama 2 7B's score at 4,096 tokens (RULER, arXiv 2404.06654).",
        _table(["variant", *(f"{length:,}" for length in lengths), "effective length"], table_rows),
    ]


def _depths(report: Report) -> list[str]:
    """Return the section of scores by depth and length; empty unless tasks ask for one fact."""
    if not report.depths:
        return []
    first = next(iter(report.depths.values()))
    table_rows = [
        [name, f"{part / PARTS:.0%} to {(part + 1) / PARTS:.0%}", *starmap(_cell, zip(scores, counts, strict=True))]
        for name, one in report.depths.items()
        for part, (scores, counts) in enumerate(zip(one.scores, one.counts, strict=True))
    ]
    note = (
        f"The average score of {', '.join(first.tasks)} by the place of the fact that answers the question, with the "
        "number of examples. Depth is the share of the prompt's characters before the fact."
    )
    return ["## By depth", note, _table(["variant", "depth", *(f"{length:,}" for length in first.lengths)], table_rows)]


def _cell(score: float | None, count: int) -> str:
    return "" if score is None else f"{score:.2f} ({count})"


def _notes(report: Report) -> str:
    words = "Accuracy, or perplexity per word where the cell says so."
    if not report.near_chance:
        return words
    is_left_out = set(report.near_chance).isdisjoint(report.averaged)
    return (
        f"{words} Near chance{', and left out of the average' if is_left_out else ''}: "
        f"{', '.join(report.near_chance)}. "
        f"There the baseline's first {SCREENED} answers are not better than guessing (one-sided exact test, 95 %): "
        "a difference says nothing about the variant."
    )


def _scores(report: Report) -> str:
    table_rows = []
    for task, by_variant in report.tasks.items():
        mark = " (near chance)" if task in report.near_chance else ""
        base = by_variant[BASELINE]
        scores = [_score(one) + (f" ({one['n']:,})" if one["n"] != base["n"] else "") for one in by_variant.values()]
        table_rows.append([task + mark, f"{base['n']:,}", *scores])
    return _table(["task", "examples", *report.variants], table_rows)


def _comparisons(report: Report, others: Sequence[str]) -> str:
    return _table(["task", "variant", *_COMPARED], list(_compared(report, others)))


def _compared(report: Report, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the cells of a table row for each task and each of the variants ``names``."""
    for task, by_variant in report.tasks.items():
        for name in names:
            figures = by_variant[name]
            if figures["accuracy"] is not None:
                cells = _cells(figures, by_variant[BASELINE], report.allowed_drop)
            elif figures["difference"] is None:
                cells = [_score(figures), "", "", "", ""]
            else:
                ends = "(few texts)" if figures["low"] is None else f"[{figures['low']:+z.1%}, {figures['high']:+z.1%}]"
                cells = [_score(figures), f"{figures['difference']:+z.1%} {ends}", "", "", ""]
            yield [task, name, *cells]


def _score(figures: Figures, digits: int = 1) -> str:
    accuracy = figures["accuracy"]
    return f"perplexity {figures['perplexity']:.{digits}f}" if accuracy is None else f"{accuracy:.3f}"


def _cells(figures: Figures, base: Figures | None, allowed_drop: float) -> list[str]:
    """Return the cells that compare ``figures`` with the baseline: accuracy, difference, p-value, verdict, needed.

    The last cell is the number of examples that a verdict needs.  For the baseline itself, all cells but the accuracy
    are empty.  If the baseline, with the figures ``base``, has answered more examples, the first cell also has its
    accuracy on those that are compared.
    """
    accuracy, verdict = f"{figures['accuracy']:.3f}", figures["verdict"]
    if verdict is None:
        return [accuracy, "", "", "", ""]
    if base and base["n"] != figures["n"]:
        accuracy += f" on {figures['n']:,} (baseline {figures['baseline']:.3f})"
    difference = _difference(figures, allowed_drop)
    p_value, needed = figures["p_mcnemar"], ""
    if verdict == "undecided":
        needed = f"{max(figures['needed'].values()):,} a task" if figures["needed"] else _UNDECIDABLE
    return [accuracy, difference, "" if p_value is None else f"{p_value:.2g}", verdict, needed]


def _difference(figures: Figures, allowed_drop: float) -> str:
    """Return the cell with a difference of accuracies and its interval, with as many decimals as are needed.

    There are at least three.  A difference is not rounded to 0, unless it is at most 1e-9, as from the rounding of
    sums.  The verdict on the interval as printed is the verdict on the interval.
    """
    difference, low, high = figures["difference"], figures["low"], figures["high"]
    assert difference is not None and low is not None and high is not None
    verdict = decide(low, high, allowed_drop)
    for digits in range(max(3, len(str(figures["n"] - 1))), 17):
        shown = [f"{value:+z.{digits}f}" for value in (difference, low, high)]
        is_zero = not float(shown[0]) and abs(difference) > _ROUNDING
        if not is_zero and decide(float(shown[1]), float(shown[2]), allowed_drop) == verdict:
            break
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _table(head: Sequence[str], table_rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *table_rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
