"""Predicted beside measured seconds: errors by group, what the predicted choice costs, a page and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.table import Table

from longctx.cost.numerals import three_digits
from recipes.common.cli import console
from recipes.common.places import read_json
from recipes.common.plots import draw_points

Row = Mapping[str, Any]
COVERED = 0.8  # share of runs that the expected error of a group is to cover


def predicted_s(row: Row) -> float:
    """Return the predicted seconds of the run in ``row``, summed over its parts."""
    return float(sum(row["predicted"].values()))


def errors(results: Sequence[Row]) -> list[float]:
    """Return the relative error of each prediction: predicted seconds over those of the median round, minus 1."""
    return [predicted_s(row) / median(row["measured"]) - 1 for row in results]


def by_group(results: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows ``results`` by the group of their runs, in their order."""
    return {
        name: [row for row in results if row["group"] == name]
        for name in dict.fromkeys(row["group"] for row in results)
    }


def choices(results: Sequence[Row]) -> Iterator[tuple[Row, Row, float]]:
    """Yield, for each set of alternatives, the run predicted fastest, the run measured fastest, and the relative loss.

    The loss is how much longer the first took than the second (0.1: 10 %).  Alternatives differ in their strategy only:
    they have the same kind of work, mesh, numbers of tokens and network.
    """
    rivals: dict[tuple[object, ...], list[Row]] = {}
    for row in results:
        same = [word for word in row["run"].split(", ") if word != row["strategy"]]
        rivals.setdefault((row["group"], row["new"], row["cached"], *same), []).append(row)
    for some in rivals.values():
        if len(some) > 1:
            chosen, best = min(some, key=predicted_s), min(some, key=lambda row: median(row["measured"]))
            yield chosen, best, median(chosen["measured"]) / median(best["measured"]) - 1


def expected_error(results: Sequence[Row], group: str) -> float | None:
    """Return the absolute relative error that at least a share `COVERED` of the runs outside ``group`` do not exceed.

    It is the error to expect in ``group``.  Returns None if no runs are outside.
    """
    others = errors([row for row in results if row["group"] != group])
    return covering_error(others) if others else None


def covering_error(some: Sequence[float]) -> float:
    """Return an absolute value that at least a share `COVERED` of the relative errors ``some`` do not exceed."""
    sizes = sorted(map(abs, some))
    return sizes[min(len(sizes) - 1, int(COVERED * len(sizes)))]


def coverage(results: Sequence[Row]) -> float | None:
    """Return the share of runs whose absolute relative error is at most their group's `expected_error`.

    It is None for a single group, for which there is no expected error.
    """
    groups = by_group(results)
    if len(groups) < 2:
        return None
    covered = [
        abs(error) <= (expected_error(results, name) or 0.0) for name, some in groups.items() for error in errors(some)
    ]
    return mean(covered)


def summary(results: Sequence[Row]) -> Iterator[tuple[str, int, float, float, str]]:
    """Yield (name, runs, mean absolute error, mean error, choices) for each group of runs, and for all.

    ``choices`` says in words for how many sets of alternatives the strategy predicted fastest took at most 3 % longer
    than the fastest one.  It also says how much longer in the worst case.  It is empty without alternatives.
    """
    for name, some in {**by_group(results), "all": list(results)}.items():
        costs = [cost for *_, cost in choices(some)]
        near = f"{sum(cost <= 0.03 for cost in costs)} of {len(costs)}, worst {max(costs):.0%}" if costs else ""
        yield name, len(some), mean(map(abs, errors(some))), mean(errors(some)), near


def show(results: Sequence[Row]) -> None:
    """Print measured and predicted times, and the summary by group."""
    table = Table("run", "measured", "fastest", "slowest", "predicted", "error", box=None)
    for row, error in zip(results, errors(results), strict=True):
        measured = row["measured"]
        seconds = (median(measured), min(measured), max(measured), predicted_s(row))
        table.add_row(row["run"], *(f"{each * 1e3:,.1f} ms" for each in seconds), f"{error:+.0%}")
    console.print(table)
    for name, count, size, _, near in summary(results):
        choice = f"; choices within 3 % of the best: {near}" if near else ""
        console.print(f"{name}, {count} runs: mean absolute error: {size:.1%}{choice}")


def page_of(results: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown page: a summary by group, then a table of each group's runs."""
    yield "| group | runs | mean absolute error | mean error | choices within 3 % of the best |"
    yield "|---|--:|--:|--:|---|"
    for name, count, size, bias, near in summary(results):
        yield f"| {name} | {count} | {size:.1%} | {bias:+.1%} | {near} |"
    share = coverage(results)
    if share is not None:
        yield ""
        yield f"The error that covers 80 % of the other groups covers {share:.0%} of all runs."
    for name, some in by_group(results).items():
        yield from ("", f"**{name}**", "")
        yield "| run | measured, ms | rounds, ms | predicted, ms | error |"
        yield "|---|--:|--:|--:|--:|"
        for row, error in zip(some, errors(some), strict=True):
            middle, first, last, predicted = (
                three_digits(1e3 * seconds)
                for seconds in (median(row["measured"]), min(row["measured"]), max(row["measured"]), predicted_s(row))
            )
            yield f"| {row['run']} | {middle} | {first} to {last} | {predicted} | {error:+.0%} |"


def draw_times(out: str, results: Sequence[Row]) -> None:
    """Draw predicted against measured seconds, a colour for each group, to the file ``out``."""
    points = {
        name: [(median(row["measured"]), predicted_s(row)) for row in some] for name, some in by_group(results).items()
    }
    draw_points(out, points, title="Predicted and measured times", x="measured, s", y="predicted, s")


def merge(file: str, results: Sequence[Row], groups: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """Return the results of ``file`` with those of ``groups`` replaced by ``results``, and the metadata of all groups.

    ``groups`` has the metadata of the new results by group.  Nothing is written; a file that does not exist counts as
    empty.  Raises ValueError for a damaged file, and for runs without groups, as older versions wrote.
    """
    before: dict[str, Any] = {"runs": [], "groups": {}}
    if Path(file).is_file():
        before = read_json(file, "remove it, or give another file", f"json={file}")
    others = [row for row in before.get("runs", []) if row.get("group", "runs") not in groups]
    if any("group" not in row for row in others):
        raise ValueError(f"json={file} has runs without groups, of an older version: give another file")
    return [*others, *results], {**before.get("groups", {}), **groups}
