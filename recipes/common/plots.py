"""Pictures of result tables as SVG files: lines, bars on a logarithmic axis, and tables of coloured cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.text_file import name_in_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626")
_MARKERS, _HATCHES = "os^vDP", ("", "//", "..", "xx", "++", "oo")  # after every fifth name, when colours begin again


def draw_lines(
    out: str,
    x_values: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
    marked: Sequence[float] = (),
    marked_label: str = "",
    levels: Sequence[float] = (),
    ticks: Sequence[float] = (),
    log_x: bool = True,
    log_y: bool = True,
) -> None:
    """Draw each of ``series`` over ``x_values`` to the file ``out``; ``x`` and ``y`` label the axes.

    ``x_values`` may have any order; lines run from the smallest to the largest.
    Dashed lines mark the values ``marked`` of x, which the legend explains by ``marked_label``, and ``levels`` of y.
    ``ticks`` are the values of x that get a label; the default is powers of ten, or as many values as fit.
    """
    figure, axes = _new_figure()
    for i, (name, values) in enumerate(series.items()):
        points = sorted(zip(x_values, values, strict=True), key=lambda point: point[0])
        axes.plot(*zip(*points, strict=True), **_line(i), label=name)
    for i, value in enumerate(marked):
        axes.axvline(value, color="#6b7280", linestyle="--", linewidth=1, label=None if i else marked_label or None)
    for value in levels:
        axes.axhline(value, color="#6b7280", linestyle="--", linewidth=1)
    if log_x:
        axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.25)
    _add_legend(figure)  # outside the axes, where it covers no line
    _save(figure, out)


def draw_points(out: str, points: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> None:
    """Draw named sets of (x, y) points and the line y = x to the file ``out``, on logarithmic axes."""
    figure, axes = _new_figure()
    values = [value for of_name in points.values() for point in of_name for value in point]
    axes.plot([min(values), max(values)], [min(values), max(values)], color="#6b7280", linestyle="--", linewidth=1)
    for i, (name, of_name) in enumerate(points.items()):
        axes.plot(*zip(*of_name, strict=True), **_line(i), linestyle="", label=name)
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(visible=True, alpha=0.25)
    _add_legend(figure)
    _save(figure, out)


def draw_tradeoff(
    out: str, panels: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]]], *, x: str
) -> None:
    """Draw ``panels[measure][title][series]``, points (x, y, label), to the file ``out``: a row for each measure.

    A series is a line.  The y axis is linear; with values above 5, it is linear up to 1 and logarithmic above.
    """
    titles = list(dict.fromkeys(title for row in panels.values() for title in row))
    names = list(dict.fromkeys(name for row in panels.values() for panel in row.values() for name in panel))
    unlabelled = set(names)  # the legend explains each series once
    figure, _ = _new_figure(3.4 * len(titles), 3.2 * len(panels) + 0.8)
    figure.clear()
    grid = figure.subplots(len(panels), len(titles), squeeze=False, sharey="row")
    for row, (measure, of_measure) in zip(grid, panels.items(), strict=True):
        row[0].set_ylabel(measure)
        largest = max(abs(y) for panel in of_measure.values() for points in panel.values() for _, y, _ in points)
        for axes, title in zip(row, titles, strict=True):
            for name, points in of_measure.get(title, {}).items():
                xs, ys, _ = zip(*points, strict=True)
                label = name if name in unlabelled else None
                unlabelled.discard(name)
                axes.plot(xs, ys, **_line(names.index(name)), linewidth=1, label=label)
                for x_value, y_value, share in points:
                    axes.annotate(share, (x_value, y_value), fontsize=6, xytext=(3, 3), textcoords="offset points")
            if largest > 5:
                axes.set_yscale("symlog", linthresh=1)
            axes.set(title=title, xlabel=x)
            axes.grid(visible=True, alpha=0.25)
    _add_legend(figure)
    _save(figure, out)


def draw_bars(
    out: str,
    values: Sequence[float],
    kinds: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    levels: Sequence[float] = (),
) -> None:
    """Draw one bar per value to the file ``out``, with a colour for each kind and dashed lines at ``levels`` of y.

    ``kinds`` has the kind of each value.  The y axis is logarithmic, and linear from 0 to the smallest magnitude among
    ``values`` that is not 0.
    """
    figure, axes = _new_figure()
    for number, kind in enumerate(sorted(set(kinds))):
        of_kind = [i for i, one in enumerate(kinds) if one == kind]
        axes.bar(of_kind, [values[i] for i in of_kind], **_bar(number), label=kind)
    for level in levels:
        axes.axhline(level, color="#6b7280", linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=max(1e-3, min(filter(None, map(abs, values)), default=1e-3)))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, axis="y", alpha=0.25)
    _add_legend(figure)
    _save(figure, out)


def draw_shares(
    out: str,
    left: Mapping[str, Sequence[tuple[float, float, float, float]]],
    right: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: tuple[str, str],
    level: tuple[str, float] | None = None,
) -> None:
    """Draw lines over a share to the file ``out``, an SVG or PNG file.

    Points of ``left`` are (share, value, lower end, upper end of its interval).  Their lines are solid.  Points of
    ``right`` are (share, value); their lines are dashed and have the right-hand y axis.  ``y`` labels both axes.
    ``level`` is the name and the value of a horizontal line on the left-hand axis.
    """
    figure, axes = _new_figure()
    right_axes = axes.twinx() if right else axes
    for i, (name, points) in enumerate(left.items()):
        share, values, low, high = zip(*sorted(points), strict=True)
        # An end that equals the value may lie on its other side, by rounding.
        below = [max(0.0, a - b) for a, b in zip(values, low, strict=True)]
        above = [max(0.0, a - b) for a, b in zip(high, values, strict=True)]
        axes.errorbar(share, values, (below, above), fmt="-", **_line(i), label=name, capsize=3)
    for i, (name, pairs) in enumerate(right.items(), len(left)):
        right_axes.plot(*zip(*sorted(pairs), strict=True), "--", **_line(i), label=name)
    if level:
        axes.axhline(level[1], color="0.4", linestyle=":", label=level[0])
    axes.set(title=title, xlabel=x, ylabel=y[0])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(visible=True, alpha=0.25)
    if right:
        right_axes.set_ylabel(y[1])
        right_axes.set_ylim(bottom=0)
        right_axes.spines["right"].set_visible(True)
    _add_legend(figure)
    _save(figure, out)


def draw_cells(
    out: str,
    panels: Mapping[str, Sequence[Sequence[float | None]]],
    columns: Sequence[str],
    lines: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    z: str,
) -> None:
    """Draw one table of cells per panel to the file ``out``: the darker a cell, the larger its value from 0 to 1.

    ``panels[name][line][column]`` is a value, or None for an empty cell.  ``columns`` and ``lines`` name each column
    and each line.  ``x``, ``y`` and ``z`` label the columns, the lines and the values as a whole.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, first = _new_figure(width=max(4.5, across * (1.5 + 0.6 * len(columns))), height=0.7 + 2.5 * down)
    first.remove()
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    colours = LinearSegmentedColormap.from_list("shares", ["#eff6ff", "#1e3a8a"])
    for axes, (name, cells) in zip(grid.flat, panels.items(), strict=False):
        values = np.array([[np.nan if cell is None else cell for cell in line] for line in cells])
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (line, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.55 else "black"
                axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(lines)), lines, fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    figure.colorbar(image, ax=grid, label=z)
    _save(figure, out)


def draw_plan(
    out: str,
    lengths: Sequence[int],
    seconds: Mapping[str, Sequence[float | None]],
    memory: Mapping[str, Mapping[str, float]],
    *,
    limit: float | None,
    title: str,
) -> None:
    """Draw plans to the file ``out``: each strategy's seconds over ``lengths``, and a GPU's memory by mesh and part.

    ``memory[mesh][part]`` is in bytes.  A length without a value (None) has no point.  A dashed line shows ``limit``,
    the memory of a GPU in GB (None: no line).
    """
    figure, axes = _new_figure(width=11)
    grid = figure.add_gridspec(1, 2)
    axes.set_subplotspec(grid[0])
    bars = figure.add_subplot(grid[1])
    # 1. Time over length.
    for i, (name, values) in enumerate(seconds.items()):
        points = [(length, value) for length, value in zip(lengths, values, strict=True) if value is not None]
        if points:  # later lines are thinner, so that coinciding lines stay visible
            axes.plot(*zip(*points, strict=True), **_line(i), linewidth=max(1, 6 - 2 * i), label=name)
    axes.set(title=title, xlabel="tokens", ylabel="seconds, best mesh", xscale="log", yscale="log")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False)
    # 2. Memory by part.
    heights = [0.0] * len(memory)
    for i, part in enumerate(next(iter(memory.values()))):
        sizes = [parts[part] / 1e9 for parts in memory.values()]
        bars.bar(range(len(memory)), sizes, bottom=heights, label=part.replace("_", " "), **_bar(i))
        heights = [height + size for height, size in zip(heights, sizes, strict=True)]
    if limit:
        bars.axhline(limit, color="#6b7280", linestyle="--", linewidth=1)
    bars.set_xticks(range(len(memory)), [name.replace(" ", "\n") for name in memory])
    bars.set(title="memory of a GPU, fastest meshes", ylabel="GB")
    bars.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, out)


def _line(number: int) -> dict[str, Any]:
    """Return the style of line ``number``: a colour, and a new marker each time that the colours begin again."""
    cycle, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": _MARKERS[cycle % len(_MARKERS)], "markersize": 4}


def _bar(number: int) -> dict[str, Any]:
    """Return the style of bars of kind ``number``: a colour, and a new hatch each time that the colours begin again."""
    cycle, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "hatch": _HATCHES[cycle % len(_HATCHES)], "edgecolor": "white", "linewidth": 0}


def _new_figure(width: float = 7, height: float = 4) -> tuple[Figure, Axes]:
    """Return an empty figure, sized in inches, and its axes; the same data gives the same SVG file, byte for byte."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "longctx", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def _add_legend(figure: Figure) -> None:
    """Add a legend below the axes, in as many columns as the longest label allows."""
    longest = max((len(str(text)) for axes in figure.axes for text in axes.get_legend_handles_labels()[1]), default=1)
    figure.legend(loc="outside lower center", ncols=max(1, min(3, 95 // (longest + 8))), frameon=False)


def _save(figure: Figure, out: str) -> None:
    import matplotlib.pyplot as plt

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(Path(out)):
        figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)
    plt.close(figure)
