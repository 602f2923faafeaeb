"""Check one GPU in minutes: kernels against float64, a ring's tiles against one call, a model's passes and steps.

python -m recipes.bench gpu_check out=DIR

Each part has a time limit, and its result is written as soon as it ends, so that a lost machine loses one part.  With
``run=local`` the parts are rehearsed on a CPU, with small numbers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt

from longctx.parallel.launch import Rank
from longctx.text_file import write_text
from recipes.bench.gpu_model_parts import check_dropped, check_logits, check_training, time_decode, time_model
from recipes.bench.gpu_parts import TableRow, check_kernels, check_tiles
from recipes.common.cli import console, on_ranks, warm_up_ranks
from recipes.common.places import refuse_unwritable_folder, write_json
from recipes.common.plots import draw_lines
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime

    Part = Callable[["GpuCheckJob", Runtime], list[TableRow]]

RECIPE = "recipes.bench gpu_check"
PICTURE = "gpu_check.svg"
PARTS: dict[str, Part] = {
    "kernels": check_kernels,
    "tiles": check_tiles,
    "logits": check_logits,
    "training": check_training,
    "dropped": check_dropped,
    "model": time_model,
    "decode": time_decode,
}

PositiveInts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(frozen=True)
class GpuCheckSettings:
    """Top-level settings of configs/bench/gpu_check.yaml."""

    out: str
    lengths: PositiveInts = (8192, 32768, 131072)
    ranks: PositiveInts = (2, 4, 8, 16)
    logits: PositiveInt = 499
    prefill: PositiveInts = (8192, 32768, 131000)
    new_tokens: PositiveInt = 32
    rounds: PositiveInt = 3
    part_seconds: PositiveInt = 65


@dataclass(frozen=True)
class GpuCheckJob:
    """The inputs of the rank.  ``about`` has model, device, machine, command and versions, for the written page."""

    settings: GpuCheckSettings
    target: Target
    about: Mapping[str, object]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model, in which every part computes."""
        dtype: torch.dtype = getattr(torch, self.target.model.dtype)
        return dtype


def prepare(config: DictConfig) -> GpuCheckJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, GpuCheckSettings)
    refuse_unwritable_folder(settings.out)
    unused = ("tp", "ulysses", "ring", "dp", "pp")
    target = resolve_target(config, RECIPE, unused_axes=unused, needs_weights=False, spd="ignore")
    if max(settings.prefill) + settings.new_tokens > target.shape.max_positions:
        raise ValueError(
            f"prefill={max(settings.prefill):,} and new_tokens={settings.new_tokens} are more than the model's "
            f"{target.shape.max_positions:,} positions: use fewer, or a larger model.max_positions"
        )
    about = {"model": target.model.name, "device": target.run.device, "machine": hardware(), **provenance()}
    return GpuCheckJob(settings, target, about)


class TimeIsUp(BaseException):
    """Raised in a part that exceeds its time limit; the part's own handlers of exceptions let it pass."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block after ``seconds``, as soon as Python code runs again."""

    def stop(*_: object) -> None:
        raise TimeIsUp(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(job: GpuCheckJob, runtime: Runtime, parts: Mapping[str, Part] = PARTS) -> dict[str, dict[str, object]]:
    """Run ``parts`` one after the other, each for at most ``part_seconds``; write all results so far after each.

    A part's result has its ``seconds``, and its ``rows`` or a line with the ``error`` that ended it.
    """
    results: dict[str, dict[str, object]] = {}
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            with time_limit(job.settings.part_seconds):
                results[name] = {"rows": part(job, runtime)}
        except (Exception, TimeIsUp) as error:  # any library may have failed; the other parts can still run
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        results[name]["seconds"] = time.perf_counter() - began
        write_results(job, results)
    return results


def write_results(job: GpuCheckJob, results: Mapping[str, Mapping[str, object]]) -> None:
    """Write ``results`` to gpu_check.json and gpu_check.md in the folder ``out``."""
    folder = Path(job.settings.out)
    write_json(str(folder / "gpu_check.json"), {**job.about, "parts": results})
    write_text(folder / "gpu_check.md", "\n".join(markdown(job.about, results)) + "\n")


def markdown(about: Mapping[str, object], results: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the lines of a page with a table for each part."""
    lines = ["# Check of one device", "", f"{about['model']} on {about['device']}: {about['machine']}."]
    lines += ["", f"Command `{about['command']}`, commit `{about['commit']}`, torch {about['torch']}."]
    for name, result in results.items():
        lines += ["", f"## {name}", "", f"{result['seconds']:.1f} s.", ""]
        table_rows = result.get("rows")
        if not isinstance(table_rows, Sequence) or not table_rows:
            lines.append(str(result.get("error", "Nothing to check on this device.")))
            continue
        lines += [f"| {' | '.join(table_rows[0])} |", f"|{'---|' * len(table_rows[0])}"]
        lines += [f"| {' | '.join(map(_in_words, row.values()))} |" for row in table_rows]
    return lines


def draw_tiles(job: GpuCheckJob, results: Mapping[str, Mapping[str, object]]) -> None:
    """Draw the part ``tiles``, if it has a result: a ring's time over that of one call, by number of ranks.

    The ring and the one call run on this one device, the ring's tiles one after the other.  The lines are forward and
    backward of the shortest and of the longest sequence.
    """
    table_rows = results.get("tiles", {}).get("rows")
    if not isinstance(table_rows, Sequence) or not table_rows:
        return
    series = {
        f"{name}, {length:,} tokens": [row[name] for row in table_rows if row["tokens"] == length]
        for name in ("forward", "backward")
        for length in sorted({min(job.settings.lengths), max(job.settings.lengths)})
    }
    ranks = job.settings.ranks
    draw_lines(
        str(Path(job.settings.out) / PICTURE),
        ranks,
        series,
        title="The tiles of a ring, one after the other",
        x="ranks of the ring",
        y="time / one call's",
        levels=[1],
        ticks=ranks,
        log_y=False,
    )


def _in_words(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run_rank(rank: Rank, job: GpuCheckJob) -> dict[str, dict[str, object]]:
    """Run all parts on the only rank, and draw the tiles; return the results by part, as `run_parts` does."""
    with job.target.runtime(rank, training=True) as runtime:
        results = run_parts(job, runtime)
    draw_tiles(job, results)
    return results


def task(config: DictConfig) -> None:
    """Run the parts, and print the page."""
    warm_up_ranks(["longctx.infer.session", "longctx.train.step", "recipes.bench.gpu_model_parts"])
    job = prepare(config)
    if on_ranks(job.target.mesh, run_rank, job) is None:
        return
    console.print((Path(job.settings.out) / "gpu_check.md").read_text())
