"""Time from token to token over a sharded cache, by each decode strategy and by one rank, side by side in one run.

python -m recipes.bench decode
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.spd_plan import refuse_adapted

STRATEGIES = ("gather_merge", "pass_q", "pass_kv", "all_gather_kv")


@dataclass(frozen=True)
class DecodeSettings:
    """The settings of configs/bench_decode.yaml that are not a section of their own."""

    cached: PositiveInt
    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    tokens: PositiveInt
    rounds: PositiveInt
    out: str | None


@dataclass(frozen=True)
class DecodeJob:
    """What every rank needs to know."""

    settings: DecodeSettings
    mesh: Mesh
    model: ModelSource
    folder: Path
    shape: ModelShape


def run_rank(rank: Rank, job: DecodeJob) -> list[dict[str, Any]]:
    """Seconds a step by way and round, and the bytes that this rank sent a step, for every batch."""
    from longctx.infer.engine import load_alone, load_engine
    from longctx.megatron.runtime import runtime

    asked = job.settings
    with runtime(rank, job.mesh, threads=1) as here, Progress(shown=rank.rank == 0) as progress:
        engine = load_engine(here, job.model, job.shape, job.folder, "auto")
        alone = load_alone(here, engine, job.model, job.folder)
        ways = {name: (engine, name) for name in STRATEGIES} | {"one rank": (alone, "gather_merge")}
        rows = []
        for batch in asked.batch:
            progress.start(f"batch of {batch}, runs", len(ways) * (asked.rounds + 1))
            sessions = {way: filled(on, name, asked, batch) for way, (on, name) in ways.items()}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            sent: dict[str, int] = {}
            for _ in range(asked.rounds + 1):
                for way, session in sessions.items():
                    here.context.all_gather(torch.zeros(1), [(1,)] * here.context.size)
                    if way != "one rank" or rank.rank == 0:
                        seconds[way].append(steps(session, asked.tokens, batch, sent, way))
                    progress.step()
            rows.append({"batch": batch, "seconds": {w: s[1:] for w, s in seconds.items()}, "bytes_sent": sent})
    return rows


def steps(session: Any, tokens: int, batch: int, sent: dict[str, int], way: str) -> float:
    """Seconds a step, of ``tokens`` steps."""
    before, began = session.engine.sent, time.perf_counter()
    for _ in range(tokens):
        session.decode(range(batch))
    sent[way] = (session.engine.sent - before) // tokens
    return (time.perf_counter() - began) / tokens


def filled(engine: Any, strategy: Any, asked: DecodeSettings, batch: int) -> Any:
    """A session of ``batch`` sequences whose caches hold random rows."""
    from longctx.attention.layout import zigzag
    from longctx.infer.session import Conversation, Session

    session = Session(engine, Context(decode=strategy), Sampling())
    for i in range(batch):
        cache = engine.cache(asked.cached + (asked.rounds + 1) * asked.tokens)
        cache.extend(zigzag(asked.cached, engine.ring.size))
        heads = max(1, engine.shape.kv_heads // engine.tp.size // engine.ulysses.size)
        shape = (1, cache.rows, heads, engine.shape.head_dim)
        dtype = next(engine.model.parameters()).dtype
        for layer in range(engine.shape.layers):
            cache.append(layer, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))
        session.sequences[i] = Conversation(cache, [0] * asked.cached + [1])
    return session


def show(rows: list[dict[str, Any]]) -> None:
    """Milliseconds a step and bytes, as a table."""
    table = Table(box=None)
    for column in ("batch", "strategy", "TTIT ms", "of one rank's", "sent a step, rank 0"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        took = {way: median(seconds) for way, seconds in row["seconds"].items()}
        for way, seconds in took.items():
            ratio, sent = f"{seconds / took['one rank']:.2f}", f"{row['bytes_sent'][way]:,} B"
            table.add_row(str(row["batch"]), way, f"{seconds * 1e3:.1f}", ratio, sent)
    console.print(table)


def task(config: DictConfig) -> None:
    """Measure; write and show what the first rank gives."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    settings, mesh = top_level(config, DecodeSettings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.bench decode", ("tp", "dp", "pp"))
    refuse_unwritable(settings.out)
    folder = locate(model, say)
    refuse_adapted(folder, "recipes.bench decode")
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    rows = on_ranks(mesh, run_rank, DecodeJob(settings, mesh, model, folder, shape))
    if rows is None:
        return
    show(rows)
    if settings.out:
        about = {"model": model.name, "mesh": str(mesh), "cached": settings.cached}
        write_result(settings.out, {**provenance(), **about, "rows": rows})
