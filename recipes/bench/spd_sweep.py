"""Seconds of a sensitivity measurement, by reusing each block's input and by a plain loop over perplexities.

    python -m recipes.bench spd_sweep out=outputs/sweep

Both give the same scores.  The plain loop runs the whole model once per block (arXiv 2502.20727, Algorithm 1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from longctx.config import DataSettings
from longctx.parallel.launch import Rank
from longctx.perplexity import perplexity
from longctx.spd.plan import SPDPlan
from longctx.spd.sensitivity import measure_sensitivity, perplexities, scores
from longctx.spd.text import PackedText
from recipes.bench.text_losses import mean_loss, sequence_losses
from recipes.bench.timing import measure_seconds
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.spd_loop import load_blocks
from recipes.common.spd_text import calibration_of, measurement_metadata, resolve_spd_target
from recipes.common.target import Target
from recipes.spd_sensitivity import WARM, sum_losses


@dataclass(frozen=True)
class SweepSettings:
    """Top-level settings of configs/bench/spd_sweep.yaml."""

    out: str
    sequences: PositiveInt = 2


@dataclass(frozen=True)
class SweepJob:
    """The inputs of every rank; ``data`` has the settings that ``text`` was read with."""

    settings: SweepSettings
    target: Target
    text: PackedText
    data: DataSettings


@dataclass(frozen=True)
class SweepTimes:
    """Seconds of both ways of measuring sensitivities, and the largest difference between their scores.

    The first way keeps each block's input (``kept_s``); the second runs the whole model for each block
    (``plain_s``).  A difference is relative to the second way's score if that is above 1 in magnitude, otherwise
    absolute.
    """

    kept_s: float
    plain_s: float
    largest_difference: float


def prepare(config: DictConfig) -> SweepJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, SweepSettings)
    target = resolve_spd_target(config, "recipes.bench spd_sweep")
    if target.mesh.dp > 1:
        raise ValueError(f"recipes.bench spd_sweep has no use for mesh.dp={target.mesh.dp}: use mesh.dp=1")
    text, data = calibration_of(config, target, settings.sequences)
    return SweepJob(settings, target, text, data)


def run_rank(rank: Rank, job: SweepJob) -> SweepTimes:
    """Measure all blocks' sensitivities on one rank, once with kept block inputs and once without.

    Return the seconds of the two ways, and the difference of their scores.
    """
    from longctx.megatron.spd.layer import follow_plan

    layers, tp = job.target.shape.layers, job.target.mesh.tp
    tokens = int(job.text.mask.sum())
    results: dict[str, list[float]] = {}
    with load_blocks(rank, job.target) as (_, blocks), Progress(shown=rank.rank == 0) as progress, torch.no_grad():

        def perplexity_of(dropped: tuple[int, ...]) -> float:
            follow_plan(blocks.model, SPDPlan(layers, tp, dropped))
            progress.step()
            return perplexity(mean_loss(sequence_losses(blocks, job.text), job.text))

        def measure_kept() -> None:
            results["kept"] = scores(perplexities(sum_losses(blocks, job.text), tokens))

        def measure_plain() -> None:
            results["plain"] = measure_sensitivity(layers, perplexity_of)

        progress.start("each block's input kept", None)
        kept_s = measure_seconds(measure_kept)
        progress.start("one pass per block", layers + 1)
        plain_s = measure_seconds(measure_plain)
    difference = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(results["kept"], results["plain"], strict=True))
    return SweepTimes(kept_s, plain_s, difference)


def task(config: DictConfig) -> None:
    """Run the ranks, then show and write the first rank's times."""
    warm_up_ranks(WARM)
    job = prepare(config)
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is None:
        return
    console.print(
        f"{times.kept_s:.1f} s with each block's input kept, {times.plain_s:.1f} s by a plain loop: "
        f"{times.plain_s / times.kept_s:.2f} times faster; scores differ by at most {times.largest_difference:.1e}"
    )
    metadata = measurement_metadata(job.target, job.text, job.data)
    write_result(str(Path(job.settings.out, "sweep.json")), {**metadata, **asdict(times), **provenance()})
