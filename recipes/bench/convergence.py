"""Loss curves of one rank and of a mesh: the same model, text and steps (arXiv 2405.07719, section 5.5).

    python -m recipes.bench convergence json=curves.json picture=curves.svg

Reports the largest difference of the losses, and the largest relative difference of the gradient norms.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from longctx.config import Mesh
from longctx.parallel.launcher import current_rank
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.plots import draw_lines
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, top_level
from recipes.common.train_job import TrainJob, refuse_offload_folder, resolve_train_job
from recipes.common.train_loop import run_rank
from recipes.common.train_resume import begin_run
from recipes.common.train_task import WARM

RUNS = ("one rank", "mesh")  # folders of the two runs


@dataclass(frozen=True)
class ConvergenceSettings:
    """Settings of configs/bench/convergence.yaml beyond those of a training run."""

    json: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class Curve:
    """Loss (nats per token) and gradient norm of a run at each of ``steps``."""

    steps: list[int]
    losses: list[float]
    grad_norms: list[float]


def prepare(config: DictConfig) -> tuple[TrainJob, ConvergenceSettings]:
    """Return the training job and the settings.  Raises ValueError, with what to set instead, if it cannot be run."""
    names, values = ("json", "picture"), as_dict(config)
    settings = top_level(as_config({name: values[name] for name in names}), ConvergenceSettings)
    for name in names:
        refuse_unwritable(getattr(settings, name), name)
    training = as_config({name: value for name, value in values.items() if name not in names})
    job = resolve_train_job(training, "recipes.bench convergence", from_scratch=True)
    for name in RUNS:
        if (job.out / name).exists() and not (job.out / name / "model" / "config.json").is_file():
            raise ValueError(
                f"out={job.out}: the folder '{name}' in it is not a run and would be emptied; give another out="
            )
    refuse_offload_folder(job.settings.offload)
    if job.target.mesh.ranks == 1:
        raise ValueError("the mesh has one rank, like the run to compare it with: use mesh.ring=2 or another mesh")
    if current_rank():  # `on_ranks` would refuse them only after `train_from_scratch` has emptied a folder
        raise ValueError(
            f"a launcher has started these ranks, but this benchmark starts its own, first 1 and then "
            f"{job.target.mesh.ranks}: start it without torchrun or srun"
        )
    return job, settings


def train_from_scratch(job: TrainJob, name: str) -> Curve:
    """Train ``job`` from its first step in the folder ``name`` below its ``out``; the folder is emptied first.

    Call it in the process that starts the ranks.  Returns the run's curve, a point for each step.
    """
    out = job.out / name
    shutil.rmtree(out, ignore_errors=True)
    run = replace(job, settings=replace(job.settings, out=str(out)))
    begin_run(run)
    say(f"{name}: {job.target.mesh}")
    on_ranks(job.target.mesh, run_rank, run)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Curve(
        *([record[key] for record in records] for key in ("step", "loss", "grad_norm"))  # each line is a step
    )


def task(config: DictConfig) -> None:
    """Train on one rank and on the mesh; print, write and draw the difference of the curves.

    The two runs replace those of an earlier start in the folder ``out``.
    """
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job, settings = prepare(config)
    # 1. Train twice.
    mesh = job.target.mesh
    one_rank = train_from_scratch(replace(job, target=replace(job.target, mesh=Mesh())), RUNS[0])
    on_mesh = train_from_scratch(job, RUNS[1])
    # 2. Compare step by step.
    steps = len(one_rank.steps)
    difference = max(abs(a - b) for a, b in zip(one_rank.losses, on_mesh.losses, strict=True))
    norm_difference = max(abs(a / b - 1) for a, b in zip(one_rank.grad_norms, on_mesh.grad_norms, strict=True))
    console.print(f"{steps} steps on one rank: loss {one_rank.losses[0]:.3f} to {one_rank.losses[-1]:.3f}")
    console.print(
        f"on {mesh}: losses differ by at most {difference:.1e} nats, gradient norms by at most {norm_difference:.1e} "
        "of their value"
    )
    # 3. Write and draw.
    if settings.json:
        result = {
            **provenance(),
            "model": job.target.model.name,
            "mesh": str(mesh),
            "steps": steps,
            "largest_difference": difference,
            "largest_norm_difference": norm_difference,
            "one_rank": one_rank.losses,
            "mesh_loss": on_mesh.losses,
        }
        write_result(settings.json, result)
    if settings.picture:
        draw_lines(
            settings.picture,
            one_rank.steps,
            {"one rank": one_rank.losses, str(mesh): on_mesh.losses},
            title=f"{steps} steps on one rank and on {mesh}: at most {difference:.1e} nats apart",
            x="step",
            y="loss, nats a token",
            log_y=False,
        )
        console.print(f"drawn to {settings.picture}")
