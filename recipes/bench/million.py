"""One layer's attention of a few new tokens over a million cached ones: seconds, bytes sent, memory.

python -m recipes.bench million
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import Mesh, ModelSource
from longctx.hf.config import shape_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unused
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level


@dataclass(frozen=True)
class MillionSettings:
    """The settings of configs/bench_million.yaml that are not a section of their own."""

    cached: PositiveInt
    new: PositiveInt
    strategies: Annotated[tuple[Literal["pass_q", "pass_kv", "all_gather_kv"], ...], Field(min_length=1)]
    rounds: PositiveInt
    out: str | None


def run_rank(rank: Rank, mesh: Mesh, shape: ModelShape, dtype: str, settings: MillionSettings) -> list[dict[str, Any]]:
    """Every strategy's figures: seconds of the slowest rank, bytes that this rank sent, peak memory."""
    from longctx.attention.backends import kernel_for
    from longctx.attention.layout import zigzag
    from longctx.infer.cache import KVCache
    from longctx.megatron.runtime import runtime
    from longctx.parallel.ring import Ring
    from longctx.parallel.strategy import STRATEGIES

    kind = getattr(torch, dtype)
    with (
        runtime(rank, mesh, threads=1) as here,
        Progress(shown=rank.rank == 0) as progress,
        torch.inference_mode(),
    ):
        progress.start("runs", len(settings.strategies) * (settings.rounds + 1))
        ring, kernel = here.ring, kernel_for("auto", here.device.type, dtype)
        cache = KVCache(ring.size, ring.rank, (settings.cached + settings.new) // ring.size + 2)
        new = zigzag(settings.new, ring.size)
        queries = new.after(zigzag(settings.cached, ring.size))
        for layout in (zigzag(settings.cached, ring.size), new):
            cache.extend(layout.after(cache.layout))
            per_rank = (1, layout.rows(ring.rank), shape.kv_heads, shape.head_dim)
            k, v = cache.append(0, torch.randn(per_rank, dtype=kind), torch.randn(per_rank, dtype=kind))
        q = torch.randn(1, new.rows(ring.rank), shape.heads, shape.head_dim, dtype=kind)

        def run(name: str) -> tuple[float, int]:
            before = ring.traffic.total
            here.context.all_gather(torch.zeros(1), [(1,)] * here.context.size)
            began = time.perf_counter()
            STRATEGIES[name](q, k, v, Ring(ring, queries, cache.layout), kernel)
            mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            sent = ring.traffic.total - before
            progress.step()
            return float(torch.cat(here.context.all_gather(mine, [(1,)] * here.context.size)).max()), sent

        return in_turn(settings.strategies, settings.rounds, run)


def in_turn(names: Sequence[str], rounds: int, run: Callable[[str], tuple[float, int]]) -> list[dict[str, Any]]:
    """The figures of every strategy; ``run``, which gives seconds and bytes, has them in turn within each round.

    A first round, as long as the others, warms up, and is not among the seconds.  The peaks are of that round, where
    the strategies behind one have not been run yet.
    """
    rows: list[dict[str, Any]] = [{"strategy": name, "seconds": []} for name in names]
    for warm in [False] + [True] * rounds:
        for row in rows:
            took, sent = run(row["strategy"])
            if warm:
                row["seconds"].append(took)
            else:
                row |= {"bytes_sent": sent, "peak_bytes": peak_bytes()}
    return rows


def peak_bytes() -> int:
    """The most memory that this process has had, so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def task(config: DictConfig) -> None:
    """Measure; write and show what the first rank gives."""
    warm_up_ranks(["longctx.megatron.runtime", "longctx.infer.cache", "recipes.common.progress"])
    settings, mesh = top_level(config, MillionSettings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.bench million", ("tp", "ulysses", "dp", "pp"))
    refuse_unwritable(settings.out)
    shape = shape_of(locate(model, say))
    rows = on_ranks(mesh, run_rank, mesh, shape, model.dtype, settings)
    if rows is None:
        return
    table = Table(box=None)
    for column in ("strategy", "seconds", "sent, rank 0", "peak memory so far, rank 0"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        sizes = (f"{row[name] / 1e6:,.1f} MB" for name in ("bytes_sent", "peak_bytes"))
        table.add_row(row["strategy"], f"{median(row['seconds']):.3f}", *sizes)
    console.print(table)
    if settings.out:
        about = {"model": model.name, "mesh": str(mesh), "dtype": model.dtype, "heads": [shape.heads, shape.kv_heads]}
        sizes_asked = {"cached": settings.cached, "new": settings.new}
        write_result(settings.out, {**provenance(), **about, **sizes_asked, "rows": rows})
