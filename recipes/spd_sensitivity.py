"""Measure the sensitivity of each block to dropping its first reduction over tensor-parallel ranks (Sync-Point-Drop).

    python -m recipes.spd_sensitivity mesh.tp=3 out=outputs/spd

Writes DIR/sensitivity.json, from which other recipes take the order in which blocks drop, and DIR/sensitivity.svg.
The same command again resumes.  Source: arXiv 2502.20727, Algorithm 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveInt
from rich.table import Table

from longctx.config import BlockClass, Track
from longctx.parallel.launch import Rank
from longctx.spd.plan import rank_blocks
from longctx.spd.sensitivity import kind_of, perplexities, scores, suffix_sums
from longctx.spd.text import PackedText
from longctx.text_file import name_in_errors
from recipes.common.cli import console, is_first, leave_stopped, main, on_every_rank, say, warm_up_ranks, write_result
from recipes.common.manifest import record
from recipes.common.plots import draw_bars
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import as_dict, section, top_level
from recipes.common.spd_loop import BlockRun, start_block_run
from recipes.common.spd_text import calibration_of, measurement_metadata, read_lines, resolve_spd_target, write_lines
from recipes.common.target import Target

if TYPE_CHECKING:
    from longctx.megatron.spd.blocks import Blocks, Hidden

RECIPE = "recipes.spd_sensitivity"
WARM = ("longctx.infer.engine", "longctx.megatron.spd.blocks", "recipes.common.spd_loop")


@dataclass(frozen=True)
class SensitivitySettings:
    """Top-level settings of configs/spd_sensitivity.yaml; recipes.spd_adapt has the same settings."""

    out: str
    sequences: PositiveInt = 16
    chunk: PositiveInt = 4


@dataclass(frozen=True)
class SensitivityThresholds:
    """Highest scores, in perplexity, of an in-sensitive block (``tau1``) and of a sensitive one (``tau2``)."""

    tau1: NonNegativeFloat = 0.05
    tau2: NonNegativeFloat = 10.0

    def __post_init__(self) -> None:
        if self.tau1 > self.tau2:
            raise ValueError(
                f"classes.tau1={self.tau1}, the highest score of an in-sensitive block, is above "
                f"classes.tau2={self.tau2}: use a tau1 of at most tau2"
            )


@dataclass(frozen=True)
class SensitivityJob:
    """The inputs of every rank: plain values, checked before any rank starts.

    ``done`` are the sums of losses that an interrupted run left, one list per chunk of ``chunk`` sequences.  ``about``
    records what the sums depend on, ``origin`` the command and the machine.
    """

    target: Target
    text: PackedText
    chunk: PositiveInt
    about: dict[str, object]
    out: Path
    done: list[list[float]]
    classes: SensitivityThresholds
    track: Track
    config: dict[str, object]
    origin: dict[str, str]

    @property
    def file(self) -> Path:
        return self.out / "sensitivity.json"

    @property
    def chunks(self) -> int:
        """Number of chunks of the text.

        The sequences of a chunk are measured together: ``chunk`` of them, or fewer in the last chunk.
        """
        return -(-len(self.text) // self.chunk)


@dataclass(frozen=True)
class BlockSensitivity:
    """``perplexity`` with this and all later blocks dropped; ``score``: its rise over dropping only the later ones."""

    score: float
    block_class: BlockClass
    perplexity: float


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivities of all ``blocks``, by block number; ``perplexity`` is that of the model with nothing dropped.

    ``order`` lists all blocks, the least sensitive first.
    """

    perplexity: float
    order: tuple[int, ...]
    blocks: tuple[BlockSensitivity, ...]

    @staticmethod
    def read(file: Path, thresholds: SensitivityThresholds) -> Sensitivities:
        """Read a sensitivity.json that `order_from` accepts; ``thresholds`` of this run classify its blocks."""
        values = json.loads(file.read_text())
        blocks = (
            BlockSensitivity(score, kind_of(score, **vars(thresholds)), float(block["perplexity"]))
            for block in values["blocks"]
            for score in [float(block["score"])]  # a perplexity beyond a float is the text "inf"
        )
        return Sensitivities(float(values["perplexity"]), tuple(values["order"]), tuple(blocks))

    def figures(self) -> dict[int, dict[str, float]]:
        """Return, for each block number, the block's figures, under the names that `track` writes to metrics.jsonl."""
        return {
            number: {"spd/sensitivity": block.score, "spd/perplexity_from_here": block.perplexity}
            for number, block in enumerate(self.blocks)
        }


def prepare(config: DictConfig, recipe: str = RECIPE) -> SensitivityJob:
    """Return the job that ``config`` asks for; ``recipe`` is the recipe that runs, for checks and messages.

    Raises ValueError, with what to set instead, if it cannot be run.
    """
    settings = top_level(config, SensitivitySettings)
    target, out = resolve_spd_target(config, recipe), Path(settings.out)
    text, data = calibration_of(config, target, settings.sequences)
    about = {**measurement_metadata(target, text, data), "chunk": settings.chunk}
    return SensitivityJob(
        target=target,
        text=text,
        chunk=settings.chunk,
        about=about,
        out=out,
        done=read_lines(out / "sums.jsonl", about),
        classes=section(config, "classes", SensitivityThresholds),
        track=section(config, "track", Track).of("spd"),
        config={**provenance(), "machine": hardware(), **as_dict(config)},
        origin=provenance(),  # taken here because a rank's process has another command line
    )


def run_rank(rank: Rank, job: SensitivityJob) -> Sensitivities | None:
    """Measure the sensitivities on one rank; return None if the run was asked to stop."""
    with start_block_run(rank, job.target) as run:
        return measure_sensitivities(run, job)


def measure_sensitivities(run: BlockRun, job: SensitivityJob) -> Sensitivities | None:
    """Return the sensitivities of all blocks on the text; None if the run was asked to stop.  Every rank calls this.

    The sums of losses are written to DIR/sums.jsonl, from which an interrupted run resumes.
    """
    run.progress.start("sensitivity, chunks of text", job.chunks, done=len(job.done))
    sums = sum_chunks(run, job)
    if run.stop.agreed_on:
        return None
    of_suffix = perplexities([sum(column) for column in zip(*sums, strict=True)], int(job.text.mask.sum()))
    block_scores = scores(of_suffix)
    blocks = (
        BlockSensitivity(score, kind_of(score, **vars(job.classes)), perplexity)
        for score, perplexity in zip(block_scores, of_suffix, strict=False)
    )
    return Sensitivities(of_suffix[-1], rank_blocks(block_scores), tuple(blocks))


def sum_chunks(run: BlockRun, job: SensitivityJob) -> list[list[float]]:
    """Measure the chunks of the text that are not in ``job.done``; return `sum_losses` of every chunk, in order.

    Each result is appended to DIR/sums.jsonl, so that an interrupted run resumes after it.  A request to stop ends the
    loop early; the result then lacks the later chunks.  With mesh.dp=2 and no chunk done yet, data-parallel rank 0
    takes chunks 0, 2, 4, ... and rank 1 takes 1, 3, 5, ...
    """
    runtime, width, file = run.runtime, job.target.shape.layers + 1, job.out / "sums.jsonl"
    dp_rank, dp_size = runtime.groups.dp.rank(), runtime.mesh.dp
    sums = list(job.done)
    if run.is_first:
        write_lines(file, [job.about, *sums])  # without a half-written last line
    for first in range(len(sums), job.chunks, dp_size):
        # 1. Measure this data-parallel rank's chunk, if the text has one for it.
        chunk, mine = first + dp_rank, torch.zeros(width, dtype=torch.float64, device=runtime.device)
        if chunk < job.chunks:
            text = job.text[slice(chunk * job.chunk, (chunk + 1) * job.chunk)]
            mine = torch.tensor(sum_losses(run.blocks, text), dtype=torch.float64, device=runtime.device)
        # 2. Gather the sums; all tensor-parallel ranks of a data-parallel rank have the same.
        gathered = runtime.world.all_gather(mine, [(width,)] * runtime.world.size)
        for chunk_sums in gathered[:: runtime.mesh.tp][: job.chunks - first]:
            sums.append(chunk_sums.tolist())
            if run.is_first:
                with name_in_errors(file), file.open("a") as lines:
                    lines.write(json.dumps(sums[-1]) + "\n")
            run.progress.step()
        if run.agree_to_stop():
            break
    return sums


@torch.no_grad()
def sum_losses(blocks: Blocks, text: PackedText) -> list[float]:
    """Return sums of losses (nats) over ``text``: one for each first dropped block, and one with none dropped.

    Entry i drops blocks i and later.  All tensor-parallel ranks return the same sums.
    """
    layers = blocks.model.decoder.layers

    def run(block: int, x: Hidden, dropped: bool) -> Hidden:
        layers[block].drop(dropped=dropped)
        return blocks.run(layers[block], x)

    return suffix_sums(blocks.embed(text.tokens), len(layers), run, lambda x: blocks.loss(x, text))


def write_sensitivity(job: SensitivityJob, sensitivities: Sensitivities) -> None:
    """Write DIR/sensitivity.json, and draw DIR/sensitivity.svg."""
    blocks = sensitivities.blocks
    values = {
        **job.about,
        "tokens": int(job.text.mask.sum()),
        "perplexity": sensitivities.perplexity,
        **vars(job.classes),
        "order": sensitivities.order,
        "blocks": [
            {"block": number, "score": block.score, "class": block.block_class, "perplexity": block.perplexity}
            for number, block in enumerate(blocks)
        ],
        **job.origin,
    }
    write_result(str(job.file), values)
    draw_bars(
        str(job.out / "sensitivity.svg"),
        [block.score for block in blocks],
        [block.block_class for block in blocks],
        title=f"{job.target.model.name} at TP={job.target.mesh.tp}: sensitivity of each block's first reduction",
        x="block",
        y=f"perplexity added by dropping it (none dropped: {sensitivities.perplexity:.1f})",
        levels=[job.classes.tau1, job.classes.tau2],
    )


def track(job: SensitivityJob, figures: Mapping[int, Mapping[str, float]], model: Path | None = None) -> None:
    """Log ``figures`` to the run's trackers, such as metrics.jsonl, under a block's number or a training step.

    If given, the folder of the adapted ``model`` is recorded too.
    """
    from longctx.train.track import start_tracking

    tracker, _ = start_tracking(job.track, job.out, job.config, first=True, say=say)
    for number in sorted(figures):
        tracker.log(figures[number], number)
    if model:
        tracker.artifact(f"spd-{model.name}", "model", model)
    tracker.finish()


def show(sensitivities: Sensitivities) -> None:
    """Print the blocks, the most sensitive first."""
    table = Table("block", "class", "perplexity added", box=None)
    for number, block in sorted(enumerate(sensitivities.blocks), key=lambda item: -item[1].score):
        table.add_row(str(number), block.block_class, f"{block.score:+.3f}")
    console.print(table)


def task(config: DictConfig) -> None:
    """Check the configuration, measure on the ranks, then write and show the result."""
    warm_up_ranks(WARM)
    job = prepare(config)
    with record(config, RECIPE, [job.target.folder]):
        sensitivities = on_every_rank(job.target.mesh, run_rank, job)
        if sensitivities is None:
            leave_stopped()
        if is_first():
            write_sensitivity(job, sensitivities)
            track(job, sensitivities.figures())
            show(sensitivities)


if __name__ == "__main__":
    main("spd_sensitivity", task)
