"""Lines, and bars over a logarithmic axis, as SVG files: what a table of figures looks like."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626")


def lines(
    out: str,
    over: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
    marked: Sequence[float] = (),
    mark: str = "",
    levels: Sequence[float] = (),
    ticks: Sequence[float] = (),
    log_x: bool = True,
    log_y: bool = True,
) -> None:
    """Draw ``series`` over ``over`` to ``out``; ``marked`` values of x, which ``mark`` explains, and ``levels`` of y
    get a dashed line.

    ``ticks`` are the values of x that are written out; if not given, powers of ten or what fits.
    """
    plt = _plots()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot(over, values, marker="o", markersize=4, label=name, color=colour)
    for i, at in enumerate(marked):
        axes.axvline(at, color="#6b7280", linestyle="--", linewidth=1, label=None if i else mark or None)
    for at in levels:
        axes.axhline(at, color="#6b7280", linestyle="--", linewidth=1)
    if log_x:
        axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # where it covers no line
    _save(plt, figure, out)


def bars(
    out: str,
    values: Sequence[float],
    kinds: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    levels: Sequence[float] = (),
) -> None:
    """Draw a bar a value to ``out``, in a colour for each of ``kinds``; between the least and 0 the axis is linear."""
    plt = _plots()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, colour in zip(sorted(set(kinds)), COLOURS, strict=False):
        at = [i for i, one in enumerate(kinds) if one == kind]
        axes.bar(at, [values[i] for i in at], label=kind, color=colour)
    for level in levels:
        axes.axhline(level, color="#6b7280", linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=max(1e-3, min(filter(None, map(abs, values)), default=1e-3)))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _save(plt, figure, out)


def shares(
    out: str,
    left: Mapping[str, Sequence[tuple[float, float]]],
    right: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: tuple[str, str],
) -> None:
    """Draw lines of (share, value) to ``out``, an SVG or PNG file: those of ``left`` solid, of ``right`` dashed and
    with their own axis.
    """
    plt = _plots()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    other = axes.twinx() if right else axes
    colours = iter(COLOURS)
    for on, series, style in ((axes, left, "-"), (other, right, "--")):
        for name, points in series.items():
            at, values = zip(*sorted(points), strict=True)
            on.plot(at, values, style, marker="o", markersize=4, label=name, color=next(colours))
    axes.set(title=title, xlabel=x, ylabel=y[0])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(visible=True, alpha=0.25)
    if right:
        other.set_ylabel(y[1])
        other.set_ylim(bottom=0)
        other.spines["right"].set_visible(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(plt, figure, out)


def _plots() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "longctx", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    return plt


def _save(plt: Any, figure: Any, out: str) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)
    plt.close(figure)
