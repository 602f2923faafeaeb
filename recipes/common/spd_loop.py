"""What each rank does when blocks learn to drop a reduction: one by one, each to its file; then all together."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.config import JointRepair, Repair
from longctx.parallel.launch import Rank
from longctx.spd.folder import read_block, write_block
from longctx.spd.plan import within
from longctx.spd.text import PackedText
from longctx.train.stop import StopRequest
from recipes import spd_sensitivity
from recipes.common.cli import say
from recipes.common.progress import Progress
from recipes.common.spd_text import load_blocks

ERRORS = ("zero_shot", "grouped", "fitted", "distilled")


@dataclass(frozen=True)
class AdaptJob:
    """What every rank needs to know.

    ``sensitivity`` is how sensitivities are measured, and ``measured`` what was found, if it is there already; ``text``
    is what blocks learn from, and ``joint_text``, behind it, what they learn from together.
    """

    sensitivity: spd_sensitivity.SensitivityJob
    measured: dict[str, Any] | None
    repair: Repair
    joint: JointRepair
    budget: float
    text: PackedText
    joint_text: PackedText
    about: Mapping[str, Any]

    @property
    def out(self) -> Path:
        return self.sensitivity.out

    @property
    def unseen(self) -> torch.Tensor:
        """Tokens that no block learns from, alone or with others."""
        return self.text.tokens[self.repair.sequences :]

    @property
    def passes(self) -> int:
        """How often ``unseen`` is taken up."""
        return -(-len(self.unseen) // self.joint.batch)

    @property
    def of_joint(self) -> dict[str, Any]:
        """What learning together depends on."""
        return {**self.about, "budget": self.budget, "joint": {**asdict(self.joint), "save_every": None}}

    def file_of(self, block: int) -> Path:
        """Where a repaired block is kept."""
        return self.out / "blocks" / f"{block:03d}.safetensors"

    @property
    def joint_folder(self) -> Path:
        """What this share of blocks learns together."""
        return self.out / f"joint_{self.budget:g}"

    def joint_file_of(self, block: int) -> Path:
        """Where a block is kept that has learned with the others."""
        return self.joint_folder / f"{block:03d}.safetensors"


def run_rank(rank: Rank, job: AdaptJob) -> dict[str, Any] | None:
    """One rank's part: measure what has not been measured, repair block by block, learn together, rank what is left.

    None if it was asked to stop before the end.
    """
    stop = StopRequest()
    with load_blocks(rank, job.sensitivity.target) as (here, blocks), Progress(shown=rank.rank == 0) as progress:
        found = adapted(here, blocks, job, progress, stop)
    stop.over()
    return found


def adapted(here: Any, blocks: Any, job: AdaptJob, progress: Progress, stop: StopRequest) -> dict[str, Any] | None:
    """The same, on the ranks' groups."""
    told = job.measured or spd_sensitivity.measured(here, blocks, job.sensitivity, progress, stop)
    if not told:
        return None
    if here.rank.rank == 0 and not job.measured:
        spd_sensitivity.keep(job.sensitivity, told)
    repair_all(here, blocks, job, told, progress, stop)
    if stop.agreed_on_all_ranks(here.world, here.device):  # also: all blocks are in their files
        return None
    wanted = chosen(here, blocks, job, within(told["order"], job.budget), progress)
    found = learn_together(here, blocks, job, wanted, progress, stop)
    return {"measured": told, **found} if found else None


def repair_all(
    here: Any, blocks: Any, job: AdaptJob, told: dict[str, Any], progress: Progress, stop: StopRequest
) -> None:
    """Every block within the budget that is not in its file; data-parallel ranks take every so many-th.

    Of all blocks the teacher's states pass by, and, if blocks are to learn from those, the student's.
    """
    wanted, how = within(told["order"], job.budget), job.repair
    left = [block for block in sorted(wanted) if not job.file_of(block).is_file()]
    dist.barrier()  # all have looked before any writes
    mine = left[here.groups.dp.rank() :: here.mesh.dp]
    steps = how.epochs * (how.sequences // how.batch)
    with torch.no_grad():
        teacher = student = blocks.embed(job.text.tokens)
    for block, layer in enumerate(blocks.model.decoder.layers[: max(mine, default=-1) + 1]):
        layer.drop(dropped=False)  # whatever measuring has left it as
        now, outputs = layer, through(blocks, layer, teacher, how.batch)
        if block in mine:
            progress.start(f"block {block}, {mine.index(block) + 1} of {len(mine)}, steps", steps)
            inputs = teacher if how.inputs == "teacher" else student
            now = repaired(here, blocks, block, told["blocks"][block]["class"], inputs, outputs, job, progress)
        elif block in wanted and how.inputs == "student":
            now = from_file(blocks, block, job)
        if how.inputs == "student":
            student = through(blocks, now, student, how.batch)
        teacher = outputs
        if stop.agreed_on_all_ranks(
            here.tp, here.device
        ):  # data-parallel ranks have other blocks, and hear of it behind those
            break


def chosen(here: Any, blocks: Any, job: AdaptJob, wanted: Sequence[int], progress: Progress) -> Sequence[int]:
    """As many blocks as are ``wanted``: of all that have been repaired, also for a larger share before, the best."""
    from longctx.megatron.spd.joint import JointDistillation

    there = [block for block in range(blocks.shape.layers) if job.file_of(block).is_file()]
    if len(there) == len(wanted):
        return wanted
    layers = {block: from_file(blocks, block, job) for block in there}
    progress.start("predictions with each that is repaired dropped alone", len(there) * job.passes)
    together = JointDistillation(blocks, layers, there, job.joint, here.groups.dp)
    alone = together.divergences_alone(job.unseen, progress.step)
    return sorted(there, key=lambda block: (alone[block], block))[: len(wanted)]


def learn_together(
    here: Any, blocks: Any, job: AdaptJob, wanted: Sequence[int], progress: Progress, stop: StopRequest
) -> dict[str, Any] | None:
    """Blocks in their `joint_file_of`, if that ``helped``: if predictions are nearer to the model's on unseen text.

    Divergences (nats a token) ``before`` and ``after`` are with all ``wanted`` blocks dropped, ``alone`` with each of
    them by itself as it is at last, ``losses`` of each step.
    """
    from longctx.megatron.spd.joint import JointDistillation

    how, part, parts = job.joint, here.groups.dp.rank(), here.mesh.dp
    layers = {block: from_file(blocks, block, job) for block in wanted}
    together = JointDistillation(blocks, layers, by_error(job, wanted), how, here.groups.dp)
    progress.start("predictions with all dropped", None)
    before = together.divergence(job.unseen)
    if how.steps:
        go_on(here, together, job)
    progress.start("blocks learn together, steps", how.steps, done=together.steps)
    while together.steps < how.steps:
        at = together.steps * how.batch
        loss = together.step(job.joint_text.tokens[at : at + how.batch][part::parts])
        progress.step(note=f"divergence {loss:.3f}")
        stops = stop.agreed_on_all_ranks(here.world, here.device)
        if stops or together.steps % how.save_every == 0 or together.steps == how.steps:
            together.save(job.joint_folder, job.of_joint)
        if stops:
            return None
    after = together.divergence(job.unseen) if how.steps else before
    helped = after < before
    for block, layer in layers.items():
        if not helped:
            blocks.fill(layer, read_block(job.file_of(block))[0])
            continue
        tensors = blocks.tensors_of(layer)
        if here.rank.rank == 0:
            write_block(job.joint_file_of(block), tensors, {})
    progress.start("predictions with each dropped alone", len(wanted) * job.passes)
    alone = together.divergences_alone(job.unseen, progress.step)
    return {"losses": together.losses, "before": before, "after": after, "helped": helped, "alone": alone}


def go_on(here: Any, together: Any, job: AdaptJob) -> None:
    """From the last whole state, if there is one; the first rank says what was passed over."""
    for passed in together.resume(job.joint_folder):
        if here.rank.rank == 0:
            say(passed)


def by_error(job: AdaptJob, wanted: Sequence[int]) -> list[int]:
    """The same blocks, first that with the smallest error on text that it has not learned from."""
    errors = {block: float(read_block(job.file_of(block))[1]["distilled"]) for block in wanted}
    return sorted(wanted, key=lambda block: (errors[block], block))


@torch.no_grad()
def through(blocks: Any, layer: Any, x: torch.Tensor, batch: int) -> torch.Tensor:
    """What leaves ``layer``, of all sequences."""
    return torch.cat([blocks.run(layer, rows) for rows in x.split(batch)])


def repaired(
    here: Any, blocks: Any, block: int, kind: Any, inputs: Any, outputs: Any, job: AdaptJob, progress: Progress
) -> Any:
    """The layer, which is also written to its file."""
    from longctx.megatron.spd.repair import repair

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


def from_file(blocks: Any, block: int, job: AdaptJob) -> Any:
    """The layer in its file."""
    layer = blocks.copy_of(block, own_norms=job.repair.own_norms)
    blocks.fill(layer, read_block(job.file_of(block))[0])
    return layer
