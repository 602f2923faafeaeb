"""The loss curve of a mesh on top of one rank's: the same model, the same text, the same steps.

    python -m recipes.bench convergence json=curves.json picture=curves.svg

What arXiv 2405.07719 shows in its section 5.5, here with the largest difference in numbers.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from longctx.config import Mesh
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.plots import lines
from recipes.common.provenance import provenance
from recipes.common.train_job import TrainJob, begin_run, resolve_train_job
from recipes.common.train_loop import run_rank
from recipes.pretrain import WARM


def curve(job: TrainJob, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run of ``job`` in a folder of its own, made anew."""
    out = job.out / name
    shutil.rmtree(out, ignore_errors=True)
    run = replace(job, settings=replace(job.settings, out=str(out)))
    begin_run(run)
    say(f"{name}: {job.target.mesh}")
    on_ranks(job.target.mesh, run_rank, run)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def task(config: DictConfig) -> None:
    """Train twice; write, draw and show how far the curves are apart."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    for name in ("json", "picture"):
        refuse_unwritable(config[name], name)
    plain = OmegaConf.create({str(k): v for k, v in config.items() if k not in ("json", "picture")})
    job = resolve_train_job(plain, "recipes.bench convergence", from_scratch=True)
    if job.target.mesh.ranks == 1:
        raise ValueError("mesh is one rank, which is what it is compared with: use mesh.ring=2 or another")
    one, other = curve(replace(job, target=replace(job.target, mesh=Mesh())), "one rank"), curve(job, "mesh")
    losses = [[line["loss"] for line in lines_of] for lines_of in (one, other)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    norms = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(one, other, strict=True))
    console.print(f"{len(one)} steps on one rank: loss {losses[0][0]:.3f} to {losses[0][-1]:.3f}")
    console.print(f"on {job.target.mesh}: at most {apart:.1e} away; norms of gradients, {norms:.1e} of themselves")
    about = {**provenance(), "model": job.target.model.name, "mesh": str(job.target.mesh), "steps": len(one)}
    if config.json:
        curves = {"one_rank": losses[0], "mesh_loss": losses[1]}
        write_result(config.json, {**about, "largest_difference": apart, "largest_norm_difference": norms, **curves})
    if config.picture:
        title = f"{len(one)} steps on one rank and on {job.target.mesh}: at most {apart:.1e} nats apart"
        lines(
            config.picture,
            [line["step"] for line in one],
            {"one rank": losses[0], str(job.target.mesh): losses[1]},
            title=title,
            x="step",
            y="loss, nats a token",
            log_y=False,
        )
        console.print(f"drawn in {Path(config.picture)}")
