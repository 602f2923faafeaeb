"""Seconds of a sensitivity sweep, with what enters a block kept, and as a plain loop over perplexities; side by side.

python -m recipes.bench spd_sweep out=outputs/sweep
"""

import time
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan
from longctx.spd.sensitivity import measure_sensitivity, perplexities, scores
from longctx.spd.text import PackedText
from recipes.bench.spd_quality import mean_loss
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.spd_text import calibration_of, load_blocks, measurement_metadata, resolve_spd_target
from recipes.common.target import Target
from recipes.spd_sensitivity import WARM, sums_of


@dataclass(frozen=True)
class SweepJob:
    """What every rank needs to know."""

    target: Target
    text: PackedText


def run_rank(rank: Rank, job: SweepJob) -> dict[str, Any]:
    """Seconds and scores of both ways."""
    from longctx.megatron.spd.layer import follow_plan

    layers, tp = job.target.shape.layers, job.target.mesh.tp
    tokens = int(job.text.mask.sum())
    with load_blocks(rank, job.target) as (_, blocks), Progress(shown=rank.rank == 0) as progress, torch.no_grad():
        progress.start("what enters a block is kept", None)
        began = time.perf_counter()
        kept = scores(perplexities(sums_of(blocks, job.text), tokens))
        between = time.perf_counter()
        progress.start("a pass for every block", layers + 1)

        def perplexity(dropped: tuple[int, ...]) -> float:
            follow_plan(blocks.model, SPDPlan(layers, tp, dropped))
            progress.step()
            return exp(mean_loss(blocks, job.text))

        plain = measure_sensitivity(layers, perplexity)
        ended = time.perf_counter()
    off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(kept, plain, strict=True))
    return {"kept_s": between - began, "plain_s": ended - between, "largest_difference": off}


def task(config: DictConfig) -> None:
    """Measure; write and show."""
    warm_up_ranks(WARM)
    target = resolve_spd_target(config, "recipes.bench spd_sweep")
    if target.mesh.dp > 1:
        raise ValueError(f"recipes.bench spd_sweep has no use for mesh.dp={target.mesh.dp}: use mesh.dp=1")
    text, data = calibration_of(config, target, config.sequences)
    found = on_ranks(target.mesh, run_rank, SweepJob(target, text))
    if found is None:
        return
    faster, off = found["plain_s"] / found["kept_s"], found["largest_difference"]
    console.print(
        f"{found['kept_s']:.1f} s with what enters a block kept, {found['plain_s']:.1f} s by a plain loop: "
        f"{faster:.2f} times faster; scores differ by at most {off:.1e}"
    )
    write_result(
        str(Path(config.out, "sweep.json")), {**measurement_metadata(target, text, data), **found, **provenance()}
    )
