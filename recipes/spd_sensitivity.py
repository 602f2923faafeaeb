"""What each block's first reduction over tensor-parallel ranks is worth: Sync-Point-Drop's sensitivity.

    python -m recipes.spd_sensitivity mesh.tp=3 out=outputs/spd

Writes DIR/sensitivity.json, which other recipes take the order of blocks from, and DIR/sensitivity.svg.  The same
command again goes on where it was interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeFloat, PositiveInt
from rich.table import Table

from longctx.config import Track
from longctx.parallel.launch import Rank
from longctx.spd.plan import rank_blocks
from longctx.spd.sensitivity import kind_of, perplexities, scores, suffix_sums
from longctx.spd.text import PackedText
from longctx.train.stop import StopRequest
from recipes.common.cli import console, is_first, leave_stopped, main, on_every_rank, say, warm_up_ranks, write_result
from recipes.common.manifest import record
from recipes.common.plots import draw_bars
from recipes.common.progress import Progress
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import section
from recipes.common.spd_text import (
    append_line,
    calibration_of,
    kept_lines,
    load_blocks,
    measurement_metadata,
    resolve_spd_target,
    write_lines,
)
from recipes.common.target import Target

WARM = ("longctx.infer.engine", "longctx.megatron.spd.blocks", "recipes.common.spd_text")


@dataclass(frozen=True)
class SensitivityThresholds:
    """Where a block begins to be sensitive, and extremely so, in perplexity."""

    tau1: NonNegativeFloat
    tau2: NonNegativeFloat


@dataclass(frozen=True)
class SensitivityJob:
    """What every rank needs to know; ``done`` are sums that an interrupted run has left."""

    target: Target
    text: PackedText
    chunk: PositiveInt
    about: dict[str, Any]
    out: Path
    done: list[list[float]]
    classes: SensitivityThresholds
    track: Track
    config: dict[str, Any]
    origin: dict[str, str]

    @property
    def file(self) -> Path:
        return self.out / "sensitivity.json"


def prepare(config: DictConfig, recipe: str = "recipes.spd_sensitivity") -> SensitivityJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    for name in ("sequences", "chunk"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name}={config[name]}: use 1 or more")
    target = resolve_spd_target(config, recipe)
    text, data = calibration_of(config, target, config.sequences)
    about, out = {**measurement_metadata(target, text, data), "chunk": config.chunk}, Path(config.out)
    values: Any = OmegaConf.to_container(config, resolve=True)
    return SensitivityJob(
        target=target,
        text=text,
        chunk=config.chunk,
        about=about,
        out=out,
        done=kept_lines(out / "sums.jsonl", about),
        classes=section(config, "classes", SensitivityThresholds),
        track=section(config, "track", Track).of("spd"),
        config={**provenance(), "machine": hardware(), **values},
        origin=provenance(),  # a rank has another command line
    )


def run_rank(rank: Rank, job: SensitivityJob) -> dict[str, Any] | None:
    """One rank's part; what goes into sensitivity.json, None if it was asked to stop before that is known."""
    stop = StopRequest()
    with load_blocks(rank, job.target) as (here, blocks), Progress(shown=rank.rank == 0) as progress:
        found = measured(here, blocks, job, progress, stop)
    stop.over()
    return found


def measured(
    here: Any, blocks: Any, job: SensitivityJob, progress: Progress, stop: StopRequest
) -> dict[str, Any] | None:
    """The same.  Every rank calls this."""
    progress.start("sensitivity, chunks of text", -(-len(job.text) // job.chunk), done=len(job.done))
    sums = swept(here, blocks, job, progress, stop)
    return None if stop.agreed_on else summed_up(job, sums)


def swept(here: Any, blocks: Any, job: SensitivityJob, progress: Progress, stop: StopRequest) -> list[list[float]]:
    """`sums_of` each chunk of the text, those that are done first; the others are added to the file as they come.

    Data-parallel ranks take every so many-th.
    """
    first, layers, file = here.rank.rank == 0, job.target.shape.layers, job.out / "sums.jsonl"
    parts, part, size = here.mesh.dp, here.groups.dp.rank(), job.chunk
    if first:
        write_lines(file, [job.about, *job.done])  # what was torn is gone
    sums, count = list(job.done), -(-len(job.text) // size)
    for begin in range(len(sums), count, parts):
        mine, chunk = torch.zeros(layers + 1, dtype=torch.float64), begin + part
        if chunk < count:
            text = job.text[slice(chunk * size, (chunk + 1) * size)]
            mine = torch.tensor(sums_of(blocks, text), dtype=torch.float64)
        of_all = here.world.all_gather(mine, [(layers + 1,)] * here.world.size)
        for each in of_all[:: here.mesh.tp][: count - begin]:
            sums.append(each.tolist())
            if first:
                append_line(file, sums[-1])
            progress.step()
        if stop.agreed_on_all_ranks(here.world, here.device):
            break
    return sums


@torch.no_grad()
def sums_of(blocks: Any, text: PackedText) -> list[float]:
    """Sums of losses (nats), the i-th with blocks i and later dropped, the last with none."""
    layers = blocks.model.decoder.layers

    def run(block: int, x: Any, dropped: bool) -> Any:
        layers[block].drop(dropped=dropped)
        return blocks.run(layers[block], x)

    return suffix_sums(blocks.embed(text.tokens), len(layers), run, lambda x: blocks.loss(x, text))


def summed_up(job: SensitivityJob, sums: list[list[float]]) -> dict[str, Any]:
    """What goes into sensitivity.json."""
    tokens = int(job.text.mask.sum())
    of_suffix = perplexities([sum(column) for column in zip(*sums, strict=True)], tokens)
    found = scores(of_suffix)
    taus = vars(job.classes)
    return {
        **job.about,
        "tokens": tokens,
        "perplexity": of_suffix[-1],
        **taus,
        "order": rank_blocks(found),
        "blocks": [
            {"block": i, "score": score, "class": kind_of(score, **taus), "perplexity": of_suffix[i]}
            for i, score in enumerate(found)
        ],
        **job.origin,
    }


def keep(job: SensitivityJob, result: dict[str, Any]) -> None:
    """Write the file and the picture."""
    write_result(str(job.file), result)
    blocks = result["blocks"]
    draw_bars(
        str(job.out / "sensitivity.svg"),
        [block["score"] for block in blocks],
        [block["class"] for block in blocks],
        title=f"{result['model']} at TP={result['tp']}: what each block's first reduction is worth",
        x="block",
        y=f"perplexity that its loss adds (without: {result['perplexity']:.1f})",
        levels=[result["tau1"], result["tau2"]],
    )


def figures_of(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    """What a run's record has of each block."""
    return {
        block: {"spd/sensitivity": told["score"], "spd/perplexity_from_here": told["perplexity"]}
        for block, told in enumerate(result["blocks"])
    }


def track(job: SensitivityJob, figures: Mapping[int, Mapping[str, float]], made: Path | None = None) -> None:
    """The run's record: ``figures`` by block, or by step; and the folder that was ``made``."""
    from longctx.train.track import start_tracking

    tracker, _ = start_tracking(job.track, job.out, job.config, first=True, say=say)
    for number in sorted(figures):
        tracker.log(figures[number], number)
    if made:
        tracker.artifact(f"spd-{made.name}", "model", made)
    tracker.finish()


def show(result: dict[str, Any]) -> None:
    """The blocks, the most sensitive first."""
    table = Table("block", "class", "adds to the perplexity", box=None)
    for block in sorted(result["blocks"], key=lambda block: -block["score"]):
        table.add_row(str(block["block"]), block["class"], f"{block['score']:+.3f}")
    console.print(table)


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; measure; write and show what was found."""
    warm_up_ranks(WARM)
    job = prepare(config)
    record(config, [job.target.folder])
    result = on_every_rank(job.target.mesh, run_rank, job)
    if result is None:
        leave_stopped()
    if is_first():
        keep(job, result)
        track(job, figures_of(result))
        show(result)


if __name__ == "__main__":
    main("spd_sensitivity", task)
