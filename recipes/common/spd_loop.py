"""Loops of the Sync-Point-Drop recipes on the ranks: run a model block by block, repair it, distil blocks jointly."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from longctx.config import BlockClass, JointRepair, Repair
from longctx.parallel.launch import Rank
from longctx.shapes import Float, Tensor, Tokens
from longctx.spd.distill import refuse_diverged
from longctx.spd.folder import read_block, write_block
from longctx.spd.plan import SPDPlan
from longctx.spd.text import PackedText
from longctx.train.stop import StopRequest
from recipes.common.cli import say
from recipes.common.progress import Progress
from recipes.common.target import Target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime
    from longctx.megatron.spd.blocks import Blocks, Hidden
    from longctx.megatron.spd.joint import JointDistillation
    from longctx.megatron.spd.layer import SPDTransformerLayer

ERRORS = ("zero_shot", "grouped", "fitted", "distilled")  # a block's errors, in the order in which repair measures them


@dataclass(frozen=True)
class BlockRun:
    """One rank's state in a run that goes through a model block by block.

    ``blocks`` runs single blocks of the model.  ``progress`` shows progress on the first rank.  ``stop`` listens for a
    request to stop.
    """

    runtime: Runtime
    blocks: Blocks
    progress: Progress
    stop: StopRequest

    @property
    def is_first(self) -> bool:
        """True on the first rank, which writes the files that all ranks share."""
        return self.runtime.rank.rank == 0

    def agree_to_stop(self) -> bool:
        """Return True on every rank if any rank was asked to stop; every rank must call it."""
        return self.stop.agreed_on_all_ranks(self.runtime.world, self.runtime.device)


@contextmanager
def load_blocks(rank: Rank, target: Target) -> Iterator[tuple[Runtime, Blocks]]:
    """Context manager: set up the process groups, load the model with nothing dropped, and yield runtime and blocks.

    Every rank must enter it.
    """
    from longctx.megatron.spd.blocks import Blocks

    with target.runtime(rank) as runtime:
        engine = target.load_engine(runtime, SPDPlan(target.shape.layers, target.mesh.tp))
        yield runtime, Blocks(engine.model, target.shape, engine.kernel, engine.tp)


@contextmanager
def start_block_run(rank: Rank, target: Target) -> Iterator[BlockRun]:
    """Context manager: `load_blocks`, listen for a request to stop, show progress on the first rank; yield the run.

    Every rank must enter it.
    """
    stop = StopRequest()
    with load_blocks(rank, target) as (runtime, blocks), Progress(shown=rank.rank == 0) as progress:
        yield BlockRun(runtime, blocks, progress, stop)
    stop.over()


@dataclass(frozen=True, kw_only=True)
class RepairJob:
    """The inputs of `Adaptation`: plain values, checked before any rank starts.

    ``text`` has repair.sequences + repair.held_out sequences; ``joint_text``, for joint distillation, has joint.steps x
    joint.batch.  ``about`` records what repaired blocks depend on.  Files in ``out``:

        blocks/about.json             ``about``
        blocks/BBB.safetensors        repaired block number BBB (three digits)
        joint_SHARE/step-*/           state of joint distillation for spd.budget=SHARE, to resume from
        joint_SHARE/BBB.safetensors   block BBB after joint distillation, if that helped
    """

    target: Target
    out: Path
    budget: float
    repair: Repair
    joint: JointRepair
    text: PackedText
    joint_text: PackedText
    about: Mapping[str, object]

    @property
    def held_out_text(self) -> PackedText:
        """Held-out text, repair.held_out sequences of repair.length tokens; no block is trained on them."""
        return self.text[slice(self.repair.sequences, None)]

    @property
    def held_out_tokens(self) -> Tokens:
        """Tokens of `held_out_text`."""
        return self.held_out_text.tokens

    @property
    def held_out_batches(self) -> int:
        """Number of batches of the held-out tokens, joint.batch sequences each."""
        return -(-len(self.held_out_tokens) // self.joint.batch)

    @property
    def about_joint(self) -> dict[str, object]:
        """Settings and inputs that the state of joint distillation depends on, saved to compare them at a resume."""
        text = hashlib.sha256(self.joint_text.tokens.numpy().tobytes()).hexdigest()
        joint = {**asdict(self.joint), "save_every": None}
        return {**self.about, "budget": self.budget, "joint": joint, "joint_text_sha256": text}

    @property
    def about_file(self) -> Path:
        return self.out / "blocks" / "about.json"

    @property
    def joint_folder(self) -> Path:
        return self.out / f"joint_{self.budget:g}"

    def block_file(self, block: int) -> Path:
        """Path of the file of a repaired block, which may not exist yet."""
        return self.out / "blocks" / f"{block:03d}.safetensors"

    def joint_block_file(self, block: int) -> Path:
        """Path of the file of a block after joint distillation, written only if that helped."""
        return self.joint_folder / f"{block:03d}.safetensors"


@dataclass(frozen=True)
class JointResult:
    """Effect of joint distillation: mean KL divergences (nats per token) from the model with nothing dropped.

    ``losses`` are those of each step.  ``before`` and ``after`` are measured on held-out text with all blocks of the
    budget dropped; they are equal without steps.  ``alone`` has, by block, the divergence with only that block dropped.
    It is measured with the distilled weights if they `helped`, otherwise with the repaired ones.
    """

    losses: list[float]
    before: float
    after: float
    alone: dict[int, float]

    @property
    def helped(self) -> bool:
        """True if distillation brought predictions closer to the original model's; only then is its result used."""
        return self.after < self.before


@dataclass(frozen=True)
class Adaptation:
    """Repair of a model's blocks on one rank, then their joint distillation.  Every rank makes the same calls."""

    run: BlockRun
    job: RepairJob

    def repair_blocks(self, classes: Mapping[int, BlockClass]) -> bool:
        """Repair every block of ``classes`` that has no `block_file` yet, and write it there.

        Returns False, on every rank, if the run was asked to stop; then blocks may be missing.  With mesh.dp=2,
        data-parallel rank 0 repairs the 1st, 3rd, 5th, ... missing block and rank 1 the others.  The hidden states of
        the model with nothing dropped (teacher) are computed block by block, up to the last block to repair.  With
        repair.inputs=student, a second set is computed as well, with the repaired blocks dropped.
        """
        run, job, settings = self.run, self.job, self.job.repair
        runtime, blocks = run.runtime, run.blocks
        # 1. Divide the blocks without a file among data-parallel ranks.
        missing = [block for block in sorted(classes) if not job.block_file(block).is_file()]
        dist.barrier()  # no rank writes a file before all ranks have listed the files
        mine = missing[runtime.groups.dp.rank() :: runtime.mesh.dp]
        # 2. Run through the blocks, and repair this rank's.
        with torch.no_grad():
            teacher = student = blocks.embed(job.text.tokens)
        for block, layer in enumerate(blocks.model.decoder.layers[: max(mine, default=-1) + 1]):
            layer.drop(dropped=False)  # measuring sensitivity leaves blocks dropped
            outputs, successor = self._forward(layer, teacher), layer
            if block in mine:
                steps = settings.epochs * (settings.sequences // settings.batch)
                run.progress.start(f"repair of block {block}, {mine.index(block) + 1} of {len(mine)}, steps", steps)
                inputs = teacher if settings.inputs == "teacher" else student
                successor = self._repair(block, classes[block], inputs, outputs)
            elif block in classes and settings.inputs == "student":
                successor = self.load_repaired(block)
            if settings.inputs == "student":
                student = self._forward(successor, student)
            teacher = outputs
            # Data-parallel ranks are at different blocks, so only the tensor-parallel ranks agree here.
            if run.stop.agreed_on_all_ranks(runtime.tp, runtime.device):
                break
        # 3. Wait until all files are written, and agree on whether to stop.
        return not run.agree_to_stop()

    def select_blocks(self, blocks: Sequence[int]) -> tuple[Sequence[int], dict[int, float]]:
        """Return the ``len(blocks)`` repaired blocks that change predictions least when each of them drops alone.

        An earlier run with a larger spd.budget may have repaired more than ``blocks``.  If not, return ``blocks``.  The
        second result has the divergence of each repaired block; it is empty if there was nothing to select.
        """
        from longctx.megatron.spd.joint import JointDistillation

        run, job = self.run, self.job
        repaired = [block for block in range(job.target.shape.layers) if job.block_file(block).is_file()]
        if len(repaired) == len(blocks):
            return blocks, {}
        run.progress.start("divergence with one repaired block dropped", len(repaired) * job.held_out_batches)
        layers = {block: self.load_repaired(block) for block in repaired}
        distillation = JointDistillation(run.blocks, layers, repaired, job.joint, run.runtime.groups.dp)
        alone = distillation.divergences_alone(job.held_out_tokens, run.progress.step)
        return sorted(repaired, key=lambda block: (alone[block], block))[: len(blocks)], alone

    def distill_jointly(self, blocks: Sequence[int], alone: Mapping[int, float]) -> JointResult | None:
        """Distil repaired ``blocks`` together; write them to their `joint_block_file` if that helped.

        ``alone`` has the divergence with each block dropped alone before the distillation; if it is empty, it is
        measured here.  The run resumes from the last saved state.  Without steps (joint.steps=0), it only measures.
        Returns None if the run was asked to stop; the state has been saved then.
        """
        from longctx.megatron.spd.joint import JointDistillation

        run, job = self.run, self.job
        # 1. Load the repaired blocks, in the order of their errors on held-out text; measure their divergence.
        layers = {block: self.load_repaired(block) for block in blocks}
        errors = {block: float(read_block(job.block_file(block))[1]["distilled"]) for block in blocks}
        order = sorted(blocks, key=lambda block: (errors[block], block))
        distillation = JointDistillation(run.blocks, layers, order, job.joint, run.runtime.groups.dp)
        run.progress.start("divergence with all blocks dropped", None)
        before = after = distillation.divergence(job.held_out_tokens)
        # 2. Train.
        if job.joint.steps:
            if not self._train(distillation):
                return None
            after = distillation.divergence(job.held_out_tokens)
        # 3. Write the result, or go back to the repaired blocks.
        for block, layer in layers.items():
            if after < before:
                tensors = run.blocks.tensors_of(layer)
                if run.is_first:
                    write_block(job.joint_block_file(block), tensors, {})
            else:
                run.blocks.fill(layer, read_block(job.block_file(block))[0])
        dist.barrier()  # every data-parallel rank reads the files
        # 4. Measure each block alone, in the weights that are used.
        if after < before or not alone:
            run.progress.start("divergence with one block dropped", len(blocks) * job.held_out_batches)
            alone = distillation.divergences_alone(job.held_out_tokens, run.progress.step)
        return JointResult(distillation.losses, before, after, {block: alone[block] for block in blocks})

    def _train(self, distillation: JointDistillation) -> bool:
        """Take the remaining steps of joint distillation.

        Return False if the run was asked to stop; the state has been saved then.
        """
        run, job, settings = self.run, self.job, self.job.joint
        for skipped in distillation.resume(job.joint_folder):
            if run.is_first:
                say(skipped)
        run.progress.start("joint distillation, steps", settings.steps, done=distillation.steps)
        while distillation.steps < settings.steps:
            first = distillation.steps * settings.batch
            batch = job.joint_text.tokens[first : first + settings.batch]
            loss = distillation.step(batch[run.runtime.groups.dp.rank() :: run.runtime.mesh.dp])
            refuse_diverged(loss, f"joint distillation, step {distillation.steps},", "joint.lr")
            run.progress.step(note=f"divergence {loss:.3f}")
            stops, done = run.agree_to_stop(), distillation.steps
            if stops or done % settings.save_every == 0 or done == settings.steps:
                distillation.save(job.joint_folder, job.about_joint)
            if stops:
                return False
        return True

    def _repair(self, block: int, block_class: BlockClass, inputs: Hidden, outputs: Hidden) -> SPDTransformerLayer:
        """Return the repaired copy of a block, and write it to its file with its class, seconds and errors."""
        from longctx.megatron.spd.repair import repair

        run, began = self.run, time.perf_counter()

        def report(loss: float) -> None:
            refuse_diverged(loss, f"repair of block {block}", "repair.lr")
            run.progress.step(note=f"error {loss:.2e}")

        result = repair(run.blocks, block, block_class, inputs, outputs, self.job.repair, report)
        refuse_diverged(result.distilled, f"repair of block {block}", "repair.lr")
        tensors = run.blocks.tensors_of(result.layer)
        if run.runtime.tp.rank == 0:
            errors = {name: str(getattr(result, name)) for name in ERRORS}
            metadata = {"class": block_class, "seconds": f"{time.perf_counter() - began:.1f}", **errors}
            write_block(self.job.block_file(block), tensors, metadata)
        layer: SPDTransformerLayer = result.layer
        return layer

    def load_repaired(self, block: int, *, joint: bool = False) -> SPDTransformerLayer:
        """Return a layer that drops its reduction, from the `block_file` or, with ``joint``, the `joint_block_file`."""
        blocks, file = self.run.blocks, self.job.joint_block_file(block) if joint else self.job.block_file(block)
        layer: SPDTransformerLayer = blocks.copy_of(block, own_norms=self.job.repair.own_norms)
        blocks.fill(layer, read_block(file)[0])
        return layer

    @torch.no_grad()
    def _forward(self, layer: SPDTransformerLayer, x: Float[Tensor, "b s hidden"]) -> Float[Tensor, "b s hidden"]:
        """Return the outputs of ``layer`` for the inputs ``x`` of all sequences, repair.batch sequences at a time."""
        return torch.cat([self.run.blocks.run(layer, rows) for rows in x.split(self.job.repair.batch)])
