"""Write longctx/cost/README.md: predicted against published figures.  ``python -m tests.cost.page`` takes a minute."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from longctx.cost.machine import strategies_differ
from longctx.cost.machine_file import machine_of
from recipes.bench.times_report import covering_error
from tests.cost.predict import (
    ROOT,
    Row,
    count_winners,
    errors_of,
    fit,
    machine,
    mean_error,
    predict,
    rows_of,
    tables,
)

PAGE = ROOT / "longctx" / "cost" / "README.md"
# Kinds of work of recipes.plan, and the published quantities that are of that kind.
KINDS = {"prefill": ("ttft",), "chat": ("turn",), "decode": ("ttit",), "train": ("step",)}
INTRO = """\
# Predicted against published

`make published` writes this page. It compares the times that the cost model predicts with published times. The
docstrings of these files have every formula, with its derivation:

| file | formulas |
|---|---|
| `attention.py` | pass-KV, pass-Q, all-gather, Ulysses and the backward ring, for one layer |
| `window.py` | rows that travel and blocks that are computed under a sliding window |
| `choice.py` | the choice of `context.strategy=auto`, from the same formulas, and the paper's rules |
| `decode.py` | a decoded token by `gather_merge` and by `sharded`, and the choice of `context.decode=auto` |
| `reduction.py` | an all-reduce; the all-reduces of a forward pass in which some blocks drop one |
| `forward.py` | a model's prefill, a turn after cached tokens, a decoded token; dropped reductions |
| `step.py` | a training step: tensor parallelism, ZeRO-1, pipeline, recomputation |
| `experts.py` | weights of experts, and what expert parallelism sends |
| `training.py` | FLOPs and MFU, with and without causal halving |
| `memory.py` | memory of a GPU by part |
| `hardware.py` | one rank: its kernel and its links, as `recipes.calibrate` measures them |
| `machine.py` | a machine: links by level, all-reduce, constants of `configs/machine/` |

For each machine, one set of constants predicts all rows. Some constants were fitted to these tables. The machine's file
in `configs/machine/` lists the fitted constants, and gives a source for most of the others. The columns of the table:

* *Mean error*, *largest*: errors of the predicted time, relative to the published time.
* *Held out*: the mean error on a table after fitting to the machine's other tables only. (A constant that the other
  tables do not determine keeps the value of the file.) The column is empty if a machine has one table.

`recipes.plan` prints an error that 80 % of the held-out predictions do not exceed.
"""
WHY = """\
## Rows that are missed by more than 10 %

{missed}

These are the reasons, as far as they are known:

* **Table 4, T = 6,400**: the published times for T = 4,160 and T = 6,400 new tokens are nearly equal. The predicted
  time grows with T, and is too short for 4,160 and too long for 6,400.
* **Table 6 of arXiv 2405.07719, ring 16**: in the backward, the float32 sums of gradients take 16 hops, and in each hop
  some ranks send to the other node. The cost model already lets computation hide as much of each hop as possible
  (`overlap: 1.0`). The published steps are faster still. The reason is not known.
* **The same table, tp = 2**: at 65,536 tokens, the published steps with tp = 2 are 21 to 40 % longer than with tp = 4,
  but only 12 % longer at 122,880. The paper gives no reason. The cost model predicts a part of the difference.
  Gradients are summed in groups of ulysses x ring x dp ranks. With tp = 2, such a group consists of every second rank,
  and the cost model gives the group one network link.

In two cases, arXiv 2411.01783 gives two times for what seems to be the same run. TTIT of 2 nodes with 128,000 tokens is
66.63 ms in Table 6 and 60.23 ms in Table 7; no model can match both. A full prefill of 128,000 tokens on 4 nodes takes
11.46 s in Table 4 and 10.95 s in Table 7. The cost model attributes this difference to the cache: the runs of Table 4
also keep the keys and values for later turns. The constant `turn_s` is the time that this takes.

Two groups of rows of arXiv 2405.07719 are not used:

* The A100 rows at 128K in its Table 4. They reach a third of the FLOPs per second of the 32K rows, and probably include
  the backward. The rows of 131,072 tokens in `usp_a100` below come from the authors' README instead.
* The rows of the basic ring, whose ranks have unequal work.
"""


def summary(leave_out: bool) -> Iterator[str]:
    """Yield the table of mean errors; fitting without each table takes most of the time."""
    yield "| table | machine | figures | mean error | largest | held out |"
    yield "|---|---|---|---|---|---|"
    for name in tables():
        rows = rows_of(name)
        hardware = rows[0].hardware
        one = machine(hardware)
        worst = max(map(abs, errors_of(rows, one)))
        others = [table for table in tables() if table != name and rows_of(table)[0].hardware == hardware]
        without = mean_error(rows, machine_of(fit(hardware, name), hardware)) if leave_out and others else None
        last = "" if without is None else f"{without:.1%}"
        yield f"| {name} | {hardware} | {len(rows)} | {mean_error(rows, one):.1%} | {worst:.1%} | {last} |"


def run_of(row: Row) -> str:
    """Return a short description of the run of ``row``."""
    axes = " ".join(f"{axis}={n}" for axis, n in vars(row.mesh).items() if n > 1) or "one rank"
    tokens = f"{row.new:,}" + (f" after {row.cached:,}" if row.cached else "")
    return f"{row.quantity}, {axes}, {tokens} tokens" + (f" x {row.batch}" if row.batch > 1 else "")


def shown(row: Row, seconds: float) -> str:
    """Return ``seconds`` as text with a unit."""
    if row.unit == "%":
        return f"{seconds:.1%}"
    return next(
        f"{seconds / size:,.4g} {unit}" for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)) if seconds >= size
    )


def rows_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of published and predicted values."""
    yield "| run | strategy | published | predicted | error |"
    yield "|---|---|---|---|---|"
    one = machine(rows[0].hardware)
    for row in rows:
        seconds = predict(row, one)
        error = seconds / row.published - 1
        yield f"| {run_of(row)} | {row.strategy} | {shown(row, row.published)} | {shown(row, seconds)} | {error:+.1%} |"


def text(leave_out: bool) -> str:
    """Return the page."""
    missed = [
        f"* {row.source}: {run_of(row)}, {row.strategy}: {error:+.0%}"
        for name in tables()
        for row, error in zip(rows_of(name), errors_of(rows_of(name), machine(rows_of(name)[0].hardware)), strict=True)
        if abs(error) > 0.1
    ]
    lines = [INTRO, *summary(leave_out), ""]
    winners = count_winners(machine("h100_gtt"))
    lines += [
        "Table 4 of arXiv 2411.01783 times two strategies in 14 cases. The strategy with the smaller predicted time is",
        f"the faster one in {winners} of them.",
        "",
    ]
    lines += [WHY.format(missed="\n".join(missed)), "## Every row", ""]
    for name in tables():
        rows = rows_of(name)
        lines += [f"### {name}", "", ", ".join(key for key, _ in groupby(row.source for row in rows)), ""]
        lines += [*rows_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def expected(hardware: str) -> Iterator[str]:
    """Yield the lines ``errors`` of a machine's file.

    Of the predictions of a kind of work, made without their own table in the fit, 80 % are within its error.
    """
    for kind, quantities in KINDS.items():
        names = [name for name in tables() if rows_of(name)[0].hardware == hardware]
        names = [name for name in names if rows_of(name)[0].quantity in quantities]
        rows = [row for name in names for row in rows_of(name)]
        if rows:
            errors = [
                error for name in names for error in errors_of(rows_of(name), machine_of(fit(hardware, name), name))
            ]
            axes = [axis for axis in vars(rows[0].mesh) if any(getattr(row.mesh, axis) > 1 for row in rows)]
            share, ranks = covering_error(errors), max(row.mesh.ranks for row in rows)
            strategies = dict.fromkeys(row.strategy for row in rows if strategies_differ(kind, row.mesh))
            limits = f"axes: [{', '.join(axes)}], ranks: {ranks}, strategies: [{', '.join(strategies)}]"
            yield f"  {kind}: {{share: {share:.3f}, {limits}}}"


if __name__ == "__main__":
    PAGE.write_text(text(leave_out=True))
    for hardware in sorted({rows_of(name)[0].hardware for name in tables()}):
        print(hardware, "errors:", *expected(hardware), sep="\n", file=sys.stderr)
