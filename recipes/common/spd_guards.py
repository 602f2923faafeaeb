"""Guards of an adapted model: measured on the ranks, shown, written, and refused where one fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from longctx.spd.guards import Guard, GuardFigures, compare_guards
from longctx.spd.plan import FILE as PLAN
from recipes.common.cli import GATE_FAILED, console, print_error
from recipes.common.places import write_json

if TYPE_CHECKING:
    from recipes.common.spd_loop import Adaptation, JointResult, RepairJob

FILE = "guards.json"


def measure_guards(adaptation: Adaptation, joint: JointResult) -> list[GuardFigures]:
    """Return the figures of three models on held-out text; every rank must call this.

    They are, in this order, the original model, the model with the blocks of ``joint`` dropped, and the model with
    these blocks dropped and repaired.
    """
    from longctx.megatron.spd.guards import measure_guards as measure

    run, text = adaptation.run, adaptation.job.held_out_text
    own = list(run.blocks.model.decoder.layers)
    run.progress.start("guards: models", 3)
    figures = []
    for drops in (False, True):
        for block in joint.alone:
            own[block].drop(dropped=drops)
        figures.append(measure(run.blocks, own, text))
        run.progress.step()
    for block in joint.alone:
        own[block].drop(dropped=False)
        own[block] = adaptation.load_repaired(block, joint=joint.helped)
    figures.append(measure(run.blocks, own, text))
    run.progress.step()
    return figures


def judge_guards(job: RepairJob, figures: Sequence[GuardFigures]) -> None:
    """Print the guards of ``figures``, and write them to guards.json in ``job.out``; exit with code 3 if one failed.

    ``figures`` is the result of `measure_guards`; only the first rank calls this.
    With repair.guard=warn a failed guard is only printed.  Empty ``figures`` (repair.guard=off) print nothing, and
    guards.json, which would be about an earlier model, is removed.
    """
    if not figures:
        (job.out / FILE).unlink(missing_ok=True)
        return
    guards = compare_guards(*figures)
    failed = [one for one in guards if one.failed]
    about = {"guard": job.repair.guard, "budget": job.budget, "written": not failed or job.repair.guard == "warn"}
    names = [one.name for one in failed]
    write_json(str(job.out / FILE), {**about, "failed": names, "guards": list(map(asdict, guards))})
    console.print(_table(guards))
    named = ", ".join(f"{one.name} {one.original:,.4g} -> {one.repaired:,.4g}" for one in failed)
    if failed and job.repair.guard == "warn":
        console.print(f"warning: the repaired model fails a guard: {named}")
    elif failed:
        earlier = f"; {job.out} still has the model of an earlier run" if (job.out / PLAN).is_file() else ""
        print_error(
            f"{named}: no model was written{earlier}; use a smaller spd.budget, or more text; the same command with "
            f"repair.guard=warn writes this model, from the blocks in {job.out}",
            "guard failed",
        )
        sys.exit(GATE_FAILED)


def _table(guards: Sequence[Guard]) -> Table:
    table = Table("guard, on held-out text", "original", "dropped", "repaired", "worse by", "limit", "", box=None)
    for one in guards:
        figures = (f"{value:,.4g}" for value in (one.original, one.dropped, one.repaired))
        table.add_row(one.name, *figures, f"{one.change:.1%}", f"{one.limit:.0%}", "FAILED" if one.failed else "")
    return table
