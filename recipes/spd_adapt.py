"""Sync-Point-Drop end to end: blocks classified, grouped, fitted and distilled, and a model saved with its plan.

    python -m recipes.spd_adapt mesh.tp=3 spd.budget=0.5 out=outputs/adapted

The result is a folder that generate, chat, pretrain, extend and eval take as model=DIR.  The same command again goes on
behind the last block, or behind the last saved step that blocks took together.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from longctx import checkpoint_index
from longctx.config import SPD, JointRepair, Repair
from longctx.parallel.launch import rank_from_environment
from longctx.spd.folder import assemble, read_block
from longctx.spd.plan import SavedPlan, SPDPlan, order_from, within
from longctx.spd.sensitivity import kind_of
from recipes import spd_sensitivity
from recipes.common.cli import console, is_first, leave_stopped, main, on_every_rank, warm_up_ranks
from recipes.common.manifest import record
from recipes.common.settings import section
from recipes.common.spd_loop import ERRORS, AdaptJob, run_rank
from recipes.common.spd_text import calibration_of, measurement_metadata, write_lines


def prepare(config: DictConfig) -> AdaptJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    spd, repair, joint = (
        section(config, "spd", SPD),
        section(config, "repair", Repair),
        section(config, "joint", JointRepair),
    )
    if spd.drop not in ("saved", "ranked") or spd.budget is None:
        raise ValueError("recipes.spd_adapt drops the least sensitive blocks: say how many with spd.budget, e.g. 0.5")
    job = spd_sensitivity.prepare(config, "recipes.spd_adapt")
    target = job.target
    if not within(range(target.shape.layers), spd.budget):
        raise ValueError(f"spd.budget={spd.budget} of {target.shape.layers} blocks is none: use more")
    if target.model.dtype != "float32":
        raise ValueError(f"model.dtype={target.model.dtype}: blocks are distilled in model.dtype=float32")
    if job.out.resolve() == target.folder.resolve():
        raise ValueError(f"out={job.out} is the folder of the model itself: give another")
    if repair.inputs == "student" and target.mesh.dp > 1:
        raise ValueError(
            f"mesh.dp={target.mesh.dp}: with repair.inputs=student a block waits for the one before; use 1"
        )
    longer = OmegaConf.merge(config, {"data": {"length": repair.length}})
    assert isinstance(longer, DictConfig)
    seen = repair.sequences + repair.held_out
    whole, data = calibration_of(longer, target, seen, more=joint.steps * joint.batch, length="repair.length")
    text = whole[slice(seen)]
    measured = _measured(spd, job)
    about = {**measurement_metadata(target, text, data), **asdict(repair), **vars(job.classes)}
    about["sensitivity"] = _digest(measured) if spd.sensitivity else "measured here"
    if repair.inputs == "student":  # which blocks drop before one changes what enters it
        about["budget"] = spd.budget
    _refuse_other_run(job.out / "blocks" / "about.json", about)
    if joint.batch % target.mesh.dp:
        raise ValueError(f"joint.batch={joint.batch} is shared by mesh.dp={target.mesh.dp}: use a multiple of it")
    # What is left of the text, then it all from its beginning, but for what is held out.
    again = islice(cycle([*range(seen, len(whole)), *range(repair.sequences)]), joint.steps * joint.batch)
    made = AdaptJob(job, measured, repair, joint, spd.budget, text, whole[list(again)], about)
    _refuse_other_joint(made)
    return made


def _refuse_other_joint(job: AdaptJob) -> None:
    """ValueError if blocks that learn together in another way are there."""
    place, _ = checkpoint_index.latest_whole(job.joint_folder)
    if place is None or not job.joint.steps:
        return
    before, now = checkpoint_index.read_metadata(place), json.loads(json.dumps(job.of_joint))
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise ValueError(f"{place} has learned with another {', '.join(changed)}: give another out=")


def _measured(spd: SPD, job: spd_sensitivity.SensitivityJob) -> dict[str, Any] | None:
    """The sensitivities that are there: those asked for, or of an earlier start of this run."""
    file, target = Path(spd.sensitivity).expanduser() if spd.sensitivity else job.file, job.target
    if not spd.sensitivity and not file.is_file():
        return None
    order_from(file, target.shape.layers, target.mesh.tp, target.fingerprint)  # refuses another model's
    told: dict[str, Any] = json.loads(file.read_text())
    for block in told["blocks"]:
        block["class"] = kind_of(block["score"], **vars(job.classes))
    return told


def _digest(measured: Mapping[str, Any] | None) -> str:
    assert measured, "a file was given"
    return hashlib.sha256(repr([block["score"] for block in measured["blocks"]]).encode()).hexdigest()[:16]


def _refuse_other_run(file: Path, about: dict[str, Any]) -> None:
    """ValueError if blocks that were repaired in another way are there."""
    now = json.loads(json.dumps(about))
    made = file.is_file() and any(file.parent.glob("*.safetensors"))
    before = json.loads(file.read_text()) if made else now
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise ValueError(
            f"{file.parent} has blocks that were made with another {', '.join(changed)}: give another out="
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    here = rank_from_environment(os.environ)
    if not made and not (here and here.rank):
        write_lines(file, [now])


def finish(job: AdaptJob, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the folder together; what became of each block that may drop.

    Its order begins with the repaired blocks, that first which alone changes predictions least.
    """
    target, told, alone = job.sensitivity.target, found["measured"], found["alone"]
    dropped = tuple(sorted(alone, key=lambda block: (alone[block], block)))
    rows = [
        {
            "block": block,
            "score": told["blocks"][block]["score"],
            "alone": alone[block],
            **read_block(job.file_of(block))[1],
        }
        for block in dropped
    ]
    order = (*dropped, *(block for block in told["order"] if block not in dropped))
    plan = SPDPlan(target.shape.layers, target.mesh.tp, dropped, job.repair.own_norms)
    saved = SavedPlan(plan, order, tuple(sorted(dropped)), target.fingerprint)
    file_of = job.joint_file_of if found["helped"] else job.file_of
    assemble(target.folder, [file_of(block) for block in sorted(dropped)], saved, job.out)
    return rows


def figures_of(found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """What the run's record has of each block, and of each step that all took together."""
    figures = spd_sensitivity.figures_of(found["measured"])
    for row in rows:
        errors = {f"spd/error_{name}": float(row[name]) for name in ERRORS}
        figures[row["block"]] |= {**errors, "spd/divergence_alone": row["alone"]}
    for step, loss in enumerate(found["losses"]):
        figures.setdefault(step, {})["spd/joint_divergence"] = loss
    figures[max(figures)] |= {f"spd/divergence_{when}": found[when] for when in ("before", "after")}
    return figures


def show(job: AdaptJob, rows: list[dict[str, Any]], found: Mapping[str, Any]) -> None:
    """Errors of the blocks, what they have learned together, and what to do with the result."""
    errors_named = ("error zero-shot", *ERRORS[1:])
    table = Table("block", "class", "sensitivity", *errors_named, "nats alone", box=None)
    for row in rows:
        errors = (f"{float(row[name]):.2e}" for name in ERRORS)
        table.add_row(str(row["block"]), row["class"], f"{row['score']:+.3f}", *errors, f"{row['alone']:.5f}")
    console.print(table)
    off = "all {} dropped, on repair.held_out text: predictions are {:.4f} nats a token off"
    console.print(off.format(len(rows), min(found["before"], found["after"])))
    if found["helped"]:
        console.print(f"before blocks learned together: {found['before']:.4f}")
    elif found["losses"]:
        console.print(
            f"learning together made that {found['after']:.4f}, and is left out: use a smaller joint.lr, or more text"
        )
    tp = job.sensitivity.target.mesh.tp
    console.print(f"to use it: python -m recipes.generate model={job.out} mesh.tp={tp} prompt.text='Once upon a time'")


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; measure and repair; put the result together and show it."""
    warm_up_ranks(
        (*spd_sensitivity.WARM, "longctx.megatron.spd.repair", "longctx.megatron.spd.joint", "recipes.common.spd_loop")
    )
    job = prepare(config)
    record(config, [job.sensitivity.target.folder])
    found = on_every_rank(job.sensitivity.target.mesh, run_rank, job)
    if found is None:
        leave_stopped()
    if is_first():
        rows = finish(job, found)
        spd_sensitivity.track(job.sensitivity, figures_of(found, rows), job.out)
        show(job, rows, found)


if __name__ == "__main__":
    main("spd_adapt", task)
