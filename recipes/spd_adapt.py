"""Sync-Point-Drop from end to end: blocks are classified, grouped, distilled, and a model with its plan is saved.

    python -m recipes.spd_adapt mesh.tp=3 spd.budget=0.5 out=outputs/adapted

The result is a folder that generate, chat, pretrain, extend and eval take as model=DIR.  The same command again goes on
behind the last block, or behind the last saved step that blocks took together.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from longctx import kept
from longctx.parallel.launch import Rank, rank_from_environment
from longctx.schema import SPD, Joint, Repair
from longctx.spd.folder import assemble, read_block, write_block
from longctx.spd.plan import SavedPlan, SPDPlan, order_from, within
from longctx.spd.sensitivity import kind_of
from longctx.spd.text import Text
from recipes import spd_sensitivity
from recipes.calibration import Subject, blocks_of, calibration_of, kept_lines, write_lines
from recipes.manifest import record
from recipes.progress import Progress
from recipes.start import console, main, on_ranks, say, section, warm_up_ranks

ERRORS = ("zero_shot", "grouped", "distilled")


@dataclass(frozen=True)
class Job:
    """What every rank needs to know.

    ``first`` is how sensitivities are measured, and ``measured`` what was found, if it is there already; ``text`` is
    what blocks learn from, and ``sensitivity`` how they are ranked then, on text behind it, of which ``done`` is
    what an interrupted run has left; behind that is ``joint_text``, from which they learn together.
    """

    sensitivity: spd_sensitivity.Job
    measured: dict[str, Any] | None
    repair: Repair
    joint: Joint
    budget: float
    text: Text
    joint_text: Text
    first: spd_sensitivity.Job
    about: Mapping[str, Any]
    done: list[list[float]]

    @property
    def out(self) -> Path:
        return self.sensitivity.out

    @property
    def again(self) -> Path:
        """The sums that this share of blocks is ranked by once it is repaired."""
        return self.out / f"sums_repaired_{self.budget:g}.jsonl"

    @property
    def of_again(self) -> dict[str, Any]:
        """What those sums depend on."""
        return {"text": self.sensitivity.about, "repair": dict(self.about), "budget": self.budget}

    @property
    def of_joint(self) -> dict[str, Any]:
        """What learning together depends on."""
        return {**self.of_again, "joint": {**asdict(self.joint), "save_every": None}}

    def file_of(self, block: int) -> Path:
        """Where a repaired block is kept."""
        return self.out / "blocks" / f"{block:03d}.safetensors"

    @property
    def joint_folder(self) -> Path:
        """What this share of blocks learns together."""
        return self.out / f"joint_{self.budget:g}"

    def last_file_of(self, block: int) -> Path:
        """The same, of a block that has learned with the others, if they do."""
        return self.joint_folder / f"{block:03d}.safetensors" if self.joint.steps else self.file_of(block)


def prepare(config: DictConfig) -> Job:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    spd, repair, joint = section(config, "spd", SPD), section(config, "repair", Repair), section(config, "joint", Joint)
    if spd.drop not in ("saved", "ranked") or spd.budget is None:
        raise ValueError("recipes.spd_adapt drops the least sensitive blocks: say how many with spd.budget, e.g. 0.5")
    job = spd_sensitivity.prepare(config, "recipes.spd_adapt")
    subject = job.subject
    if subject.model.dtype != "float32":
        raise ValueError(f"model.dtype={subject.model.dtype}: blocks are distilled in model.dtype=float32")
    if job.out.resolve() == subject.folder.resolve():
        raise ValueError(f"out={job.out} is the folder of the model itself: give another")
    if repair.inputs == "student" and subject.mesh.dp > 1:
        raise ValueError(
            f"mesh.dp={subject.mesh.dp}: with repair.inputs=student a block waits for the one before; use 1"
        )
    longer = OmegaConf.merge(config, {"data": {"length": repair.length}})
    assert isinstance(longer, DictConfig)
    text, data = calibration_of(longer, subject, repair.sequences + repair.held_out)
    measured = _measured(spd, job)
    about = {**subject.about(text, data), **asdict(repair), **vars(job.classes)}
    about["sensitivity"] = _digest(measured) if spd.sensitivity else "measured here"
    if repair.inputs == "student":  # which blocks drop before one changes what enters it
        about["budget"] = spd.budget
    _refuse_other_run(job.out / "blocks" / "about.json", about)
    behind = -(-(repair.sequences + repair.held_out) * repair.length // job.text.tokens.shape[1])
    unseen, _ = calibration_of(config, subject, config.sequences, behind=behind)
    joint_text = text[slice(0)]
    if joint.steps:
        joint_text = _joint_text(joint, longer, subject, behind + config.sequences, job.text.tokens.shape[1])
    made = Job(replace(job, text=unseen), measured, repair, joint, spd.budget, text, joint_text, job, about, [])
    _refuse_other_joint(made)
    return replace(made, done=kept_lines(made.again, made.of_again))


def _joint_text(joint: Joint, config: DictConfig, subject: Subject, behind: int, length: int) -> Text:
    """What blocks learn from together: what is behind so many sequences of that length, then all from its beginning."""
    if joint.batch % subject.mesh.dp:
        raise ValueError(f"joint.batch={joint.batch} is shared by mesh.dp={subject.mesh.dp}: use a multiple of it")
    behind = -(-behind * length // config.data.length)
    return calibration_of(config, subject, joint.steps * joint.batch, behind=behind, once=False)[0]


def _refuse_other_joint(job: Job) -> None:
    """ValueError if blocks that learn together in another way are there."""
    place, _ = kept.latest(job.joint_folder)
    if place is None or not job.joint.steps:
        return
    before, now = kept.about(place), json.loads(json.dumps(job.of_joint))
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise ValueError(f"{place} has learned with another {', '.join(changed)}: give another out=")


def _measured(spd: SPD, job: spd_sensitivity.Job) -> dict[str, Any] | None:
    """The sensitivities that are there: those asked for, or of an earlier start of this run."""
    file, subject = Path(spd.sensitivity).expanduser() if spd.sensitivity else job.file, job.subject
    if not spd.sensitivity and not file.is_file():
        return None
    order_from(file, subject.shape.layers, subject.mesh.tp, subject.fingerprint)  # refuses another model's
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


def run_rank(rank: Rank, job: Job) -> dict[str, Any]:
    """One rank's part: measure what has not been measured, repair block by block, rank that again, learn together."""
    with blocks_of(rank, job.sensitivity.subject) as (here, blocks), Progress(shown=rank.rank == 0) as progress:
        told = job.measured or spd_sensitivity.measured(here, blocks, job.first, progress)
        if rank.rank == 0 and not job.measured:
            spd_sensitivity.keep(job.first, told)
        repair_all(here, blocks, job, told, progress)
        here.world.all_gather(torch.zeros(1), [(1,)] * here.world.size)  # all blocks are in their files
        again = ranked_again(here, blocks, job, told, progress)
        order = dropping_order(job, told, again)
        return {
            "measured": told,
            "again": again,
            "order": order,
            "joint": learn_together(here, blocks, job, order, progress),
        }


def repair_all(here: Any, blocks: Any, job: Job, told: dict[str, Any], progress: Progress) -> None:
    """Every block within the budget that is not in its file; data-parallel ranks take every so many-th.

    Of all blocks the teacher's states pass by, and, if blocks are to learn from those, the student's.
    """
    wanted, how = sorted(within(told["order"], job.budget)), job.repair
    mine = wanted[here.groups.dp.rank() :: here.mesh.dp]
    left = [block for block in mine if not job.file_of(block).is_file()]
    steps = how.epochs * (how.sequences // how.batch)
    with torch.no_grad():
        teacher = student = blocks.embedded(job.text.tokens)
    for block, layer in enumerate(blocks.model.decoder.layers[: max(left, default=-1) + 1]):
        layer.drop(dropped=False)  # whatever measuring has left it as
        now, outputs = layer, through(blocks, layer, teacher, how.batch)
        if block in left:
            progress.start(f"block {block}, {mine.index(block) + 1} of {len(mine)}, steps", steps)
            inputs = teacher if how.inputs == "teacher" else student
            now = repaired(here, blocks, block, told["blocks"][block]["class"], inputs, outputs, job, progress)
        elif block in mine:
            now = from_file(blocks, block, job)
        if how.inputs == "student":
            student = through(blocks, now, student, how.batch)
        teacher = outputs


def ranked_again(
    here: Any, blocks: Any, job: Job, told: dict[str, Any], progress: Progress
) -> list[dict[str, Any]] | None:
    """Sensitivities of the blocks as they are now; None where one depends on which others drop."""
    if job.repair.inputs == "student":
        return None
    mine = job.sensitivity
    layers = {block: from_file(blocks, block, job) for block in within(told["order"], job.budget)}
    progress.start("sensitivity once more, chunks of text", -(-len(mine.text) // mine.chunk), done=len(job.done))
    sums = spd_sensitivity.swept(here, blocks, mine, job.again, job.of_again, job.done, progress, layers)
    found: list[dict[str, Any]] = spd_sensitivity.summed_up(mine, sums)["blocks"]
    return found


def dropping_order(job: Job, told: dict[str, Any], again: list[dict[str, Any]] | None) -> tuple[int, ...]:
    """The blocks within the budget, in the order of what is left of their sensitivity, where that is known."""
    wanted: tuple[int, ...] = within(told["order"], job.budget)
    return tuple(sorted(wanted, key=lambda block: (again[block]["score"], block))) if again else wanted


def learn_together(here: Any, blocks: Any, job: Job, order: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Blocks in their `last_file_of`; divergences (nats a token) of steps, and with all dropped before and after."""
    if not job.joint.steps or not order:
        return {"steps": [], "before": None, "after": None}
    from longctx.megatron.joint import Together

    how, part, parts = job.joint, here.groups.dp.rank(), here.mesh.dp
    unseen = job.text.tokens[job.repair.sequences :]  # unless ``joint_text`` came to the text's end
    layers = {block: from_file(blocks, block, job) for block in order}
    together = Together(blocks, layers, order, how, here.groups.dp)
    progress.start("blocks learn together", None)
    before = together.divergence(unseen)
    for passed in together.resume(job.joint_folder):
        say(passed)
    progress.start("blocks learn together, steps", how.steps, done=together.steps)
    while together.steps < how.steps:
        at = together.steps * how.batch
        loss = together.step(job.joint_text.tokens[at : at + how.batch][part::parts])
        progress.step(note=f"divergence {loss:.3f}")
        if together.steps % how.save_every == 0 or together.steps == how.steps:
            together.save(job.joint_folder, job.of_joint)
    for block, layer in layers.items():
        tensors = blocks.tensors_of(layer)
        if here.rank.rank == 0:
            write_block(job.last_file_of(block), tensors, {})
    return {"steps": together.losses, "before": before, "after": together.divergence(unseen)}


@torch.no_grad()
def through(blocks: Any, layer: Any, x: torch.Tensor, batch: int) -> torch.Tensor:
    """What leaves ``layer``, of all sequences."""
    return torch.cat([blocks.run(layer, rows) for rows in x.split(batch)])


def repaired(
    here: Any, blocks: Any, block: int, kind: Any, inputs: Any, outputs: Any, job: Job, progress: Progress
) -> Any:
    """The layer, which is also written to its file."""
    from longctx.megatron.repair import repair

    began = time.perf_counter()
    made = repair(
        blocks, block, kind, inputs, outputs, job.repair, lambda loss: progress.step(note=f"error {loss:.2e}")
    )
    tensors = blocks.tensors_of(made.layer)
    if here.tp.rank == 0:
        errors = {name: str(getattr(made, name)) for name in ERRORS}
        about = {"class": kind, "seconds": f"{time.perf_counter() - began:.1f}", **errors}
        write_block(job.file_of(block), tensors, about)
    return made.layer


def from_file(blocks: Any, block: int, job: Job) -> Any:
    """The layer in its file."""
    layer = blocks.copy_of(block, own_norms=job.repair.own_norms)
    blocks.fill(layer, read_block(job.file_of(block))[0])
    return layer


def finish(job: Job, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the folder together; what became of each block that may drop.

    Its order begins with the repaired blocks, in the order of what is left of their sensitivity.
    """
    subject, told, again = job.sensitivity.subject, found["measured"], found["again"]
    dropped, rows = found["order"], []
    for block in dropped:
        _, about = read_block(job.file_of(block))
        left = again[block]["score"] if again else None
        rows.append({"block": block, "score": told["blocks"][block]["score"], "left": left, **about})
    order = (*dropped, *(block for block in told["order"] if block not in dropped))
    plan = SPDPlan(subject.shape.layers, subject.mesh.tp, dropped, job.repair.own_norms)
    saved = SavedPlan(plan, order, tuple(sorted(dropped)), subject.fingerprint)
    assemble(subject.folder, [job.last_file_of(block) for block in sorted(dropped)], saved, job.out)
    return rows


def figures_of(told: dict[str, Any], rows: list[dict[str, Any]], joint: Sequence[float]) -> dict[int, dict[str, float]]:
    """What the run's record has of each block, and of each step that all took together."""
    figures = spd_sensitivity.figures_of(told)
    for row in rows:
        figures[row["block"]] |= {f"spd/error_{name}": float(row[name]) for name in ERRORS}
    for step, loss in enumerate(joint):
        figures.setdefault(step, {})["spd/joint_divergence"] = loss
    return figures


def show(job: Job, rows: list[dict[str, Any]], joint: Mapping[str, Any]) -> None:
    """Errors of the blocks, what they have learned together, and what to do with the result."""
    table = Table("block", "class", "sensitivity", "repaired", "error zero-shot", "grouped", "distilled", box=None)
    for row in rows:
        errors = (f"{float(row[name]):.2e}" for name in ERRORS)
        left = "" if row["left"] is None else f"{row['left']:+.3f}"
        table.add_row(str(row["block"]), row["class"], f"{row['score']:+.3f}", left, *errors)
    console.print(table)
    if joint["steps"]:
        console.print(
            f"all {len(rows)} dropped, on repair.held_out text: predictions are {joint['after']:.4f} nats a token off; "
            f"before they learned together, {joint['before']:.4f}"
        )
    tp = job.sensitivity.subject.mesh.tp
    console.print(f"to use it: python -m recipes.generate model={job.out} mesh.tp={tp} prompt.text='Once upon a time'")


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; measure and repair; put the result together and show it."""
    warm_up_ranks((*spd_sensitivity.WARM, "longctx.megatron.repair", "longctx.megatron.joint"))
    job = prepare(config)
    record(config, [job.sensitivity.subject.folder])
    found = on_ranks(job.sensitivity.subject.mesh, run_rank, job)
    if found is not None:
        rows = finish(job, found)
        spd_sensitivity.track(job.sensitivity, figures_of(found["measured"], rows, found["joint"]["steps"]), job.out)
        show(job, rows, found["joint"])


if __name__ == "__main__":
    main("spd_adapt", task)
