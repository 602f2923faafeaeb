"""Attention of one layer: a few new tokens over a million cached ones; seconds, bytes sent and memory.

python -m recipes.bench million
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.attention.layout import zigzag
from longctx.parallel.launch import Rank
from longctx.train.meter import peak_resident_bytes
from recipes.bench.timing import append_random_rows, measure_in_rounds, time_on_ranks
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.cache import KVCache
    from longctx.megatron.runtime import Runtime


@dataclass(frozen=True)
class MillionSettings:
    """Top-level settings of configs/bench/million.yaml."""

    cached: PositiveInt = 1_000_000
    new: PositiveInt = 128
    strategies: Annotated[tuple[Literal["pass_q", "pass_kv", "all_gather_kv"], ...], Field(min_length=1)] = (
        "pass_q", "pass_kv",
    )  # fmt: skip
    rounds: PositiveInt = 3
    out: str | None = None


@dataclass(frozen=True)
class MillionJob:
    """The inputs of the benchmark that every rank gets."""

    settings: MillionSettings
    target: Target


@dataclass(frozen=True)
class StrategyTimes:
    """The slowest rank's seconds by round; bytes that this rank sent in a round, and its peak memory.

    ``peak_bytes`` is the peak from the start of the process to the end of the strategy's warm-up round.  No strategy
    listed later has run by then.
    """

    strategy: str
    seconds: list[float]
    bytes_sent: int
    peak_bytes: int


@dataclass(frozen=True)
class _Round:
    seconds: float
    bytes_sent: int
    peak_bytes: int


def prepare(config: DictConfig) -> MillionJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, MillionSettings)
    refuse_unwritable(settings.out)
    unused = ("tp", "ulysses", "dp", "pp")
    target = resolve_target(config, "recipes.bench million", unused_axes=unused, needs_weights=False, spd="ignore")
    return MillionJob(settings, target)


def run_rank(rank: Rank, job: MillionJob) -> list[StrategyTimes]:
    """Time every strategy, as one of the ranks; the first rank's bytes and memory are reported."""
    from longctx.attention.backends import kernel_for
    from longctx.infer.cache import KVCache
    from longctx.parallel.ring import Ring
    from longctx.parallel.strategy import STRATEGIES

    settings, shape, dtype = job.settings, job.target.shape, job.target.model.dtype
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress, torch.inference_mode():
        progress.start("runs", len(settings.strategies) * (settings.rounds + 1))
        ring, kernel = runtime.ring, kernel_for("auto", runtime.device.type, dtype)
        # 1. Random keys and values of all tokens, and queries of the new ones.
        cache = KVCache(ring.size, ring.rank, (settings.cached + settings.new) // ring.size + 2)
        queries = zigzag(settings.new, ring.size).after(zigzag(settings.cached, ring.size))
        fill(cache, job, runtime)
        k, v = cache.layer(0)
        rows = queries.rows(ring.rank)
        q = torch.randn(1, rows, shape.heads, shape.head_dim, dtype=getattr(torch, dtype))

        # 2. Attention by each strategy in turn.
        def attend(name: str) -> tuple[float, int]:
            sent = ring.traffic.total
            around = Ring(ring, queries, cache.layout)
            seconds = time_on_ranks(runtime.context, lambda: STRATEGIES[name](q, k, v, around, kernel))
            progress.step()
            return seconds, ring.traffic.total - sent

        return time_strategies(settings.strategies, settings.rounds, attend)


def fill(cache: KVCache, job: MillionJob, runtime: Runtime) -> None:
    """Append random keys and values of the cached tokens, then of the new ones, to ``cache``."""
    shape, dtype = job.target.shape, getattr(torch, job.target.model.dtype)
    for tokens in (job.settings.cached, job.settings.new):
        layout = zigzag(tokens, runtime.ring.size)
        append_random_rows(cache, layout, layers=1, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=dtype)


def time_strategies(
    names: Sequence[str], rounds: int, attend: Callable[[str], tuple[float, int]]
) -> list[StrategyTimes]:
    """Time the strategies ``names`` in turn within each round; ``attend`` runs one, returns its seconds and bytes."""

    def measure(name: str) -> _Round:
        return _Round(*attend(name), peak_resident_bytes())

    return [
        StrategyTimes(name, [each.seconds for each in r.timed], r.warm_up.bytes_sent, r.warm_up.peak_bytes)
        for name, r in zip(names, measure_in_rounds(names, rounds, measure), strict=True)
    ]


def show(times: list[StrategyTimes]) -> None:
    """Print median seconds, bytes sent and memory of each strategy as a table."""
    table = Table(box=None)
    for column in ("strategy", "seconds", "sent, rank 0", "peak memory so far, rank 0"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for each in times:
        sizes = (f"{size / 1e6:,.1f} MB" for size in (each.bytes_sent, each.peak_bytes))
        table.add_row(each.strategy, f"{median(each.seconds):.3f}", *sizes)
    console.print(table)


def task(config: DictConfig) -> None:
    """Run the ranks, then show and write the first rank's times."""
    warm_up_ranks(["longctx.megatron.runtime", "longctx.infer.cache", "recipes.common.progress"])
    job = prepare(config)
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is None:
        return
    show(times)
    settings, target = job.settings, job.target
    if settings.out:
        inputs = {
            "model": target.model.name,
            "mesh": str(target.mesh),
            "dtype": target.model.dtype,
            "heads": [target.shape.heads, target.shape.kv_heads],
            "cached": settings.cached,
            "new": settings.new,
        }
        write_result(settings.out, {**provenance(), **inputs, "rows": [asdict(each) for each in times]})
