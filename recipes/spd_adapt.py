"""Adapt a model to Sync-Point-Drop: blocks that skip their first reduction over tensor-parallel ranks are repaired.

    python -m recipes.spd_adapt mesh.tp=3 spd.budget=0.5 out=outputs/adapted

1. Measure the sensitivity of every block         `measure_sensitivities`         DIR/sensitivity.json
2. Rank blocks: spd.budget=0.5 drops the least sensitive half
3. Repair these block by block                    `Adaptation.repair_blocks`      DIR/blocks/
4. Distil them jointly                            `Adaptation.distill_jointly`    DIR/joint_0.5/
5. Measure guards                                 `measure_guards`                DIR/guards.json
6. Save the model and its plan                    `save`                          DIR

`run_rank` takes steps 1 to 5 on every rank, `task` step 6 in the first process.  README.md lists the recipes that then
take model=DIR.  The same command again resumes after the last file of DIR.  Exit code 3: a guard failed, and no model
was written.  Source: arXiv 2502.20727.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from longctx import checkpoint_index
from longctx.config import SPD, JointRepair, Repair
from longctx.parallel.launch import Rank
from longctx.spd.folder import assemble, read_block
from longctx.spd.guards import GuardFigures
from longctx.spd.plan import SavedPlan, SPDPlan, least_budget, order_from, within
from recipes import spd_sensitivity
from recipes.common.cli import console, is_first, leave_stopped, main, on_every_rank, warm_up_ranks
from recipes.common.manifest import record
from recipes.common.places import read_json
from recipes.common.settings import as_dict, section
from recipes.common.spd_guards import judge_guards, measure_guards
from recipes.common.spd_loop import ERRORS, Adaptation, JointResult, RepairJob, start_block_run
from recipes.common.spd_text import calibration_of, changed_keys, measurement_metadata, write_lines
from recipes.common.target import Target
from recipes.spd_sensitivity import Sensitivities, SensitivityJob, measure_sensitivities, write_sensitivity

RECIPE = "recipes.spd_adapt"
WARM = (
    *spd_sensitivity.WARM,
    "longctx.megatron.spd.repair",
    "longctx.megatron.spd.joint",
    "recipes.spd_sensitivity",
    "torch._dynamo",  # every rank would import it, with its optimizer
)


def run_rank(rank: Rank, job: AdaptJob) -> AdaptResult | None:
    """Adapt the model on one rank: steps 1 to 5 of this module, from sensitivities to guards.

    Returns None if the run was asked to stop.
    """
    with start_block_run(rank, job.target) as run:
        adaptation = Adaptation(run, job)
        # 1. Measure the sensitivity of every block, unless a file has it.
        sensitivities = job.sensitivities or measure_sensitivities(run, job.sensitivity)
        if sensitivities is None:
            return None
        if run.is_first and not job.sensitivities:
            write_sensitivity(job.sensitivity, sensitivities)
        # 2. Rank blocks: those of the budget drop, the least sensitive first.
        blocks = within(sensitivities.order, job.budget)
        # 3. Repair these block by block.
        if not adaptation.repair_blocks({block: sensitivities.blocks[block].block_class for block in blocks}):
            return None
        # 4. Distil the best of all repaired blocks jointly.
        joint = adaptation.distill_jointly(*adaptation.select_blocks(blocks))
        if joint is None:
            return None
        # 5. Measure what an average hides: first tokens, the worst sequence, copying.
        figures = [] if job.repair.guard == "off" else measure_guards(adaptation, joint)
    return AdaptResult(sensitivities, joint, figures)


def task(config: DictConfig) -> None:
    """Check the configuration, adapt the model on the ranks, then save it and show the result.

    Exits with code 3, without saving the model, if a guard fails and repair.guard is not warn.
    """
    warm_up_ranks(WARM)
    job = prepare(config)
    with record(config, RECIPE, [job.target.folder]):
        begin(job)
        result = on_every_rank(job.target.mesh, run_rank, job)
        if result is None:
            leave_stopped()
        if is_first():
            # 6. Save the model and its plan, unless a guard fails.
            judge_guards(job, result.guard_figures)
            dropped = save(job, result)
            spd_sensitivity.track(job.sensitivity, figures_of(result, dropped), job.out)
            show(job, result, dropped)


@dataclass(frozen=True, kw_only=True)
class AdaptJob(RepairJob):
    """The inputs of every rank; ``sensitivities`` is None if they are to be measured, by the job ``sensitivity``."""

    sensitivity: SensitivityJob
    sensitivities: Sensitivities | None


@dataclass(frozen=True)
class AdaptResult:
    """Results of adapting on one rank; ``joint.alone`` has the divergence of each dropped block when it alone drops.

    ``guard_figures`` is empty with repair.guard=off.
    """

    sensitivities: Sensitivities
    joint: JointResult
    guard_figures: list[GuardFigures]


@dataclass(frozen=True)
class DroppedBlock:
    """A block that drops its reduction: its class and sensitivity, and how well it was repaired.

    ``errors`` are relative squared errors of the block's output (`ERRORS`).  ``divergence`` is the KL divergence of the
    predictions on held-out text (nats per token) if only this block drops.
    """

    block: int
    block_class: str
    score: float
    errors: dict[str, float]
    divergence: float


def prepare(config: DictConfig) -> AdaptJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    # 1. Settings, model and mesh.
    if as_dict(config.spd)["blocks"] is not None:
        raise ValueError("recipes.spd_adapt chooses the blocks that drop a reduction: leave out spd.blocks")
    spd, repair = section(config, "spd", SPD), section(config, "repair", Repair)
    joint = section(config, "joint", JointRepair)
    if spd.drop not in ("saved", "ranked") or spd.budget is None:
        raise ValueError(
            f"spd={spd.drop} with spd.budget={spd.budget}: recipes.spd_adapt drops a share of the blocks, the least "
            "sensitive first; use spd=saved with spd.budget=0.5 or another share"
        )
    sensitivity = spd_sensitivity.prepare(config, RECIPE)
    target, out = sensitivity.target, sensitivity.out
    refuse_unfit_target(target, out, spd.budget, repair, joint)
    # 2. Text.  Joint distillation takes the sequences after repair's and the held-out ones, then repair's, and so on.
    repair_config = OmegaConf.merge(config, {"data": {"length": repair.length}})
    assert isinstance(repair_config, DictConfig)
    first_joint, joint_count = repair.sequences + repair.held_out, joint.steps * joint.batch
    text, data = calibration_of(repair_config, target, first_joint, joint_count, "repair.length")
    joint_rows = islice(cycle([*range(first_joint, len(text)), *range(repair.sequences)]), joint_count)
    repair_text, joint_text = text[slice(first_joint)], text[list(joint_rows)]
    # 3. The record that a resumed run must match.
    sensitivities = read_sensitivities(spd, sensitivity)
    about = {**measurement_metadata(target, repair_text, data), **asdict(repair), **vars(sensitivity.classes)}
    del about["guard"]  # changes no block
    if repair.weights == "uniform":
        del about["weights"]  # as in the records of runs before there was the setting
    about["sensitivity"] = digest(sensitivities) if spd.sensitivity and sensitivities else "measured here"
    if repair.inputs == "student":  # a block's inputs then depend on which blocks drop before it
        about["budget"] = spd.budget
    job = AdaptJob(
        target=target,
        out=out,
        budget=spd.budget,
        repair=repair,
        joint=joint,
        text=repair_text,
        joint_text=joint_text,
        about=about,
        sensitivity=sensitivity,
        sensitivities=sensitivities,
    )
    refuse_other_run(job)
    return job


def refuse_unfit_target(target: Target, out: Path, budget: float, repair: Repair, joint: JointRepair) -> None:
    """Raise ValueError, with what to set instead, for a model, mesh or folder that cannot be adapted."""
    layers, dp = target.shape.layers, target.mesh.dp
    if not within(range(layers), budget):
        raise ValueError(f"spd.budget={budget} of {layers} blocks drops none: use {least_budget(layers):g} or more")
    if target.model.dtype != "float32":
        raise ValueError(
            f"model.dtype={target.model.dtype} is not supported: recipes.spd_adapt needs model.dtype=float32"
        )
    if target.shape.norms != "pre" or target.shape.residual_scale != 1:
        raise ValueError(
            "recipes.spd_adapt is not tested on models that normalise or scale the outputs of attention and MLP: "
            "use a model like Llama or Qwen, or drop reductions without repair"
        )
    if out.resolve() == target.folder.resolve():
        raise ValueError(f"out={out} is the folder of the model to adapt: use another out=")
    if repair.inputs == "student" and dp > 1:
        raise ValueError(f"mesh.dp={dp}: with repair.inputs=student a block waits for the one before; use mesh.dp=1")
    if joint.batch % dp:
        raise ValueError(
            f"joint.batch={joint.batch} is not a multiple of mesh.dp={dp}: use joint.batch={-(-joint.batch // dp) * dp}"
        )


def read_sensitivities(spd: SPD, job: SensitivityJob) -> Sensitivities | None:
    """Return the sensitivities in spd.sensitivity, or those of an earlier start of this run; None if there are neither.

    Raises ValueError for a file that cannot be read, or of another model or tensor-parallel degree.
    """
    file, target = Path(spd.sensitivity).expanduser() if spd.sensitivity else job.file, job.target
    if not spd.sensitivity and not file.is_file():
        return None
    order_from(file, target.shape.layers, target.mesh.tp, target.fingerprint)
    return Sensitivities.read(file, job.classes)


def digest(sensitivities: Sensitivities) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the blocks' scores."""
    return hashlib.sha256(repr([block.score for block in sensitivities.blocks]).encode()).hexdigest()[:16]


def refuse_other_run(job: AdaptJob) -> None:
    """Raise ValueError if ``out`` has blocks, or a state of joint distillation, that were made with other settings.

    Also raises ValueError if ``out`` has states of joint distillation, but none is whole.
    """
    if has_blocks(job) and job.about_file.is_file():
        folder = job.about_file.parent
        before = read_json(job.about_file, f"use another out=, or remove {folder}; the same command repairs again")
        if changed := changed_keys(before, job.about):
            raise ValueError(f"{folder} has blocks made with other values of {', '.join(changed)}: use another out=")
    place, passed_over = checkpoint_index.latest_whole(job.joint_folder)
    if job.joint.steps:
        checkpoint_index.refuse_none_whole(job.joint_folder, place, passed_over)
    if place and job.joint.steps:
        # The state's metadata also has the order of blocks, losses and file sizes, which may differ.  A state of an
        # earlier version has no joint_text_sha256.
        state = checkpoint_index.read_metadata(place)
        changed = [
            key
            for key in changed_keys(state, job.about_joint)
            if key in job.about_joint and (key in state or key != "joint_text_sha256")
        ]
        if changed:
            raise ValueError(f"{place} was trained with other values of {', '.join(changed)}: use another out=")


def has_blocks(job: AdaptJob) -> bool:
    """Return True if ``out`` has a repaired block."""
    return any(job.about_file.parent.glob("*.safetensors"))


def begin(job: AdaptJob) -> None:
    """Write what repaired blocks depend on to ``job.about_file``, unless ``out`` has repaired blocks and this file."""
    if is_first() and not (job.about_file.is_file() and has_blocks(job)):
        write_lines(job.about_file, [job.about])


def save(job: AdaptJob, result: AdaptResult) -> list[DroppedBlock]:
    """Write the adapted model to ``out``, and return the repaired blocks in the order in which they drop.

    The first is the block that, dropped alone, changes predictions least.  In the saved plan, the order continues with
    the other blocks, the least sensitive first.
    """
    target, joint = job.target, result.joint
    order = sorted(joint.alone, key=lambda block: (joint.alone[block], block))
    rest = [block for block in result.sensitivities.order if block not in joint.alone]
    plan = SPDPlan(target.shape.layers, target.mesh.tp, tuple(order), job.repair.own_norms)
    saved = SavedPlan(plan, (*order, *rest), plan.dropped, target.fingerprint)
    file_of = job.joint_block_file if joint.helped else job.block_file
    assemble(target.folder, [file_of(block) for block in plan.dropped], saved, job.out)
    return [_dropped_block(job, result, block) for block in order]


def _dropped_block(job: AdaptJob, result: AdaptResult, block: int) -> DroppedBlock:
    metadata = read_block(job.block_file(block))[1]
    errors = {name: float(metadata[name]) for name in ERRORS}
    score = result.sensitivities.blocks[block].score
    return DroppedBlock(block, metadata["class"], score, errors, result.joint.alone[block])


def figures_of(result: AdaptResult, dropped: list[DroppedBlock]) -> dict[int, dict[str, float]]:
    """Return the figures that `track` logs, by number of a block or of a step of joint distillation.

    A block and a step of the same number share an entry.  The last entry also has the divergences before and after
    distillation.
    """
    figures, joint = result.sensitivities.figures(), result.joint
    for block in dropped:
        errors = {f"spd/error_{name}": error for name, error in block.errors.items()}
        figures[block.block] |= {**errors, "spd/divergence_alone": block.divergence}
    for step, loss in enumerate(joint.losses):
        figures.setdefault(step, {})["spd/joint_divergence"] = loss
    figures[max(figures)] |= {"spd/divergence_before": joint.before, "spd/divergence_after": joint.after}
    return figures


def show(job: AdaptJob, result: AdaptResult, dropped: list[DroppedBlock]) -> None:
    """Print the errors of the dropped blocks, the effect of joint distillation, and a command that uses the model."""
    table = Table("block", "class", "sensitivity", *(f"error {name}" for name in ERRORS), "nats alone", box=None)
    for block in dropped:
        errors = (f"{error:.2e}" for error in block.errors.values())
        table.add_row(str(block.block), block.block_class, f"{block.score:+.3f}", *errors, f"{block.divergence:.5f}")
    console.print(table)
    joint = result.joint
    console.print(
        f"divergence on repair.held_out text with all {len(dropped)} blocks dropped: "
        f"{min(joint.before, joint.after):.4f} nats per token"
    )
    if joint.helped:
        console.print(f"before joint distillation: {joint.before:.4f}")
    elif joint.losses:
        console.print(
            f"joint distillation was discarded, since it gave {joint.after:.4f}: use a smaller joint.lr, or more text"
        )
    mesh = job.target.mesh
    console.print(
        f"to use it: python -m recipes.generate {shlex.quote(f'model={job.out}')} mesh.tp={mesh.tp} "
        "prompt.text='Once upon a time'"
    )


if __name__ == "__main__":
    main("spd_adapt", task)
