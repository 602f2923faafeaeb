"""Lines over a logarithmic axis, as an SVG file: what a table of benchmarks looks like."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    log_y: bool = True,
) -> None:
    """Draw ``series`` over ``over`` to ``out``; ``marked`` values of x, which ``mark`` explains, and ``levels`` of y
    get a dashed line.

    ``ticks`` are the values of x that are written out; powers of ten, if not given.
    """
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "longctx", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot(over, values, marker="o", markersize=4, label=name, color=colour)
    for i, at in enumerate(marked):
        axes.axvline(at, color="#6b7280", linestyle="--", linewidth=1, label=None if i else mark or None)
    for at in levels:
        axes.axhline(at, color="#6b7280", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # where it covers no line
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
