"""What dropped reductions save: time to first token, and from token to token, over the share of blocks that drop one.

python -m recipes.bench spd_latency hosts=3 rate=100mbit latency_us=500
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Context, Mesh, ModelSource, PromptSource, Sampling
from longctx.cost.reduction import all_reduce_seconds, communication_saved, spd_forward_seconds
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.spd.plan import SPDPlan, within
from recipes.bench.hosts import bits_per_s, is_host, refuse_hosts, run_on_hosts
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.plots import lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.spd_plan import refuse_adapted

PHASES = ("prefill", "decode")
ELEMENT = 4  # bytes: float32


@dataclass(frozen=True)
class LatencySettings:
    """The settings of configs/bench_spd_latency.yaml that are not a section of their own."""

    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)]
    tokens: PositiveInt
    new_tokens: PositiveInt
    rounds: PositiveInt
    hosts: NonNegativeInt
    rate: str
    latency_us: NonNegativeFloat
    out: str | None
    picture: str | None

    def __post_init__(self) -> None:
        if self.shares[0] != 0:
            raise ValueError(f"shares={list(self.shares)}: the first is what others are compared with, use 0")


@dataclass(frozen=True)
class LatencyJob:
    """What every rank needs to know."""

    settings: LatencySettings
    mesh: Mesh
    model: ModelSource
    folder: Path
    shape: ModelShape
    tokens: tuple[int, ...]


def run_rank(rank: Rank, job: LatencyJob) -> dict[str, Any]:
    """Of every share and round the two times, and what of them are all-reduces; the links' own constants."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.layer import follow_plan

    asked, layers, tp = job.settings, job.shape.layers, job.mesh.tp
    with runtime(rank, job.mesh, threads=1) as here, Progress(shown=rank.rank == 0) as progress:
        engine = load_engine(here, job.model, job.shape, job.folder, "auto", SPDPlan(layers, tp))
        progress.start("shares, runs", len(asked.shares) * (asked.rounds + 1))
        rows: list[list[dict[str, Any]]] = [[] for _ in asked.shares]
        for warm in [False] + [True] * asked.rounds:
            for row, share in zip(rows, asked.shares, strict=True):
                follow_plan(engine.model, SPDPlan(layers, tp, within(range(layers), share)))
                took = timed(here, engine, job)
                if warm:
                    row.append(took)
                progress.step()
        constants = links(here, job)
    return {"rows": rows, **constants}


def timed(here: Any, engine: Any, job: LatencyJob) -> dict[str, dict[str, float]]:
    """Seconds of a prefill, and of a decoded token; the slowest rank's, and this one's all-reduces."""
    from longctx.infer.session import Session
    from longctx.parallel.measure.all_reduce import count_all_reduces

    session = Session(engine, Context(), Sampling())
    found: dict[str, dict[str, float]] = {}

    def phase(name: str, work: Any, steps: int) -> Any:
        here.world.all_gather(torch.zeros(1), [(1,)] * here.world.size)  # all begin at once
        with count_all_reduces() as tally:
            began = time.perf_counter()
            made = work()
            mine = torch.tensor([time.perf_counter() - began, tally.seconds], dtype=torch.float64) / steps
        slowest = torch.stack(here.world.all_gather(mine, [(2,)] * here.world.size))
        # A rank that comes early waits inside; the last to come is the one that tells how long a reduction takes.
        seconds, reducing = float(slowest[:, 0].max()), float(slowest[:, 1].min())
        calls, size = tally.calls / steps, tally.bytes / steps
        found[name] = {"seconds": seconds, "reducing": reducing, "calls": calls, "bytes": size}
        return made

    phase("prefill", lambda: session.turn({0: job.tokens}, {0: 1}), 1)

    def decode() -> None:
        for _ in range(job.settings.new_tokens):
            session.decode([0])

    phase("decode", decode, job.settings.new_tokens)
    return found


def links(here: Any, job: LatencyJob) -> dict[str, float]:
    """Seconds of a hop, from the shortest all-reduce; bytes a second: the links' nominal rate, or as measured."""
    from longctx.parallel.measure.all_reduce import time_all_reduce

    ranks, settings = job.mesh.tp, job.settings
    short, size = time_all_reduce(here.groups.tp, 4, 20, here.device), settings.tokens * job.shape.hidden * ELEMENT
    hop = short / (2 * (ranks - 1))
    if settings.hosts:
        return {"hop_s": hop, "bytes_per_s": bits_per_s(settings.rate) / 8}
    long = time_all_reduce(here.groups.tp, size, 20, here.device)
    return {"hop_s": hop, "bytes_per_s": 2 * (ranks - 1) / ranks * size / max(1e-9, long - short)}


def judged(found: dict[str, Any], job: LatencyJob) -> list[dict[str, Any]]:
    """A row for every phase and share: medians, what is saved, and what bytes and hops predict."""
    layers, out = job.shape.layers, []
    for phase in PHASES:
        rows = job.settings.tokens if phase == "prefill" else 1
        one = all_reduce_seconds(rows * job.shape.hidden * ELEMENT, job.mesh.tp, found["hop_s"], found["bytes_per_s"])
        base: dict[str, float] = {}
        for share, rounds in zip(job.settings.shares, found["rows"], strict=True):
            now = {key: median(each[phase][key] for each in rounds) for key in rounds[0][phase]}
            base = base or now
            blocks = len(within(range(layers), share)) / layers
            predicted = spd_forward_seconds(base["seconds"], layers, blocks, one)
            out.append(
                {
                    "phase": phase,
                    "share": blocks,
                    **now,
                    "rounds": [each[phase]["seconds"] for each in rounds],
                    "saved": 1 - now["seconds"] / base["seconds"],
                    "predicted_saved": 1 - predicted / base["seconds"],
                    "reducing_saved": 1 - now["reducing"] / base["reducing"],
                    "predicted_reducing_saved": communication_saved(blocks),
                    "bytes_saved": 1 - now["bytes"] / base["bytes"],
                }
            )
    return out


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    columns = ("phase", "dropped", "ms", "saved", "predicted", "all-reduces", "their ms", "saved", "p/2")
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(
            row["phase"],
            f"{row['share']:.0%}",
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['saved']:.1%}",
            f"{row['predicted_saved']:.1%}",
            f"{row['calls']:.0f}",
            f"{row['reducing'] * 1e3:,.1f}",
            f"{row['reducing_saved']:.1%}",
            f"{row['predicted_reducing_saved']:.1%}",
        )
    console.print(table)


def asked_for(config: DictConfig) -> LatencyJob:
    """What ``config`` asks for.  Raises ValueError if it cannot be done."""
    settings, mesh = top_level(config, LatencySettings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.bench spd_latency", ("ulysses", "ring", "dp", "pp"))
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: one rank reduces nothing, use mesh.tp=2 or more")
    if model.dtype != "float32":
        raise ValueError(f"model.dtype={model.dtype}: bytes are counted in model.dtype=float32")
    if settings.hosts:
        refuse_hosts(settings.hosts, settings.rate, mesh)
    else:
        warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    folder = locate(model, say)
    refuse_adapted(folder, "recipes.bench spd_latency")
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    return LatencyJob(settings, mesh, model, folder, shape, prompt_of(settings, folder, shape))


def prompt_of(settings: LatencySettings, folder: Path, shape: ModelShape) -> tuple[int, ...]:
    """The prompt.  Raises ValueError if the text is shorter, or if with what is decoded the model's context is."""
    if settings.tokens + settings.new_tokens > shape.max_positions:
        raise ValueError(
            f"tokens={settings.tokens} and new_tokens={settings.new_tokens}: the model's context is "
            f"{shape.max_positions:,}; use at most that together"
        )
    tokens, available = prompt_tokens(PromptSource(pydoc="all", tokens=settings.tokens), tokenizer_of(folder))
    if available < settings.tokens:
        raise ValueError(f"tokens={settings.tokens}: the text has {available:,} tokens; use at most that")
    return tuple(tokens)


def task(config: DictConfig) -> None:
    """Measure; write, draw and show what the first rank gives."""
    job = asked_for(config)
    settings = job.settings
    if settings.hosts and not is_host():
        command = [sys.executable, *sys.orig_argv[1:]]
        run_on_hosts(settings.hosts, settings.rate, command, settings.latency_us)
        return
    found = on_ranks(job.mesh, run_rank, job)
    if found is None:
        return
    rows = judged(found, job)
    show(rows)
    link = {"rate": settings.rate, "latency_us": settings.latency_us} if settings.hosts else {"rate": "loopback"}
    constants = {name: found[name] for name in ("hop_s", "bytes_per_s")}
    about = {"model": job.model.name, "mesh": str(job.mesh), "hosts": settings.hosts, **link, **constants}
    if settings.out:
        write_result(settings.out, {**about, "tokens": settings.tokens, **provenance(), "rows": rows})
    if settings.picture:
        draw(rows, job, f"{link['rate']}, {settings.latency_us:g} us" if settings.hosts else "loopback")


def draw(rows: list[dict[str, Any]], job: LatencyJob, link: str) -> None:
    """What is saved over the share of dropped blocks, beside the prediction."""
    shares = [100 * row["share"] for row in rows if row["phase"] == "prefill"]
    series = {}
    for phase in PHASES:
        of_phase = [row for row in rows if row["phase"] == phase]
        series[f"{phase}, measured"] = [100 * row["saved"] for row in of_phase]
        series[f"{phase}, from bytes and hops"] = [100 * row["predicted_saved"] for row in of_phase]
    lines(
        str(job.settings.picture),
        shares,
        series,
        title=f"{job.model.name} at TP={job.mesh.tp}, {link}: time saved",
        x="blocks that drop a reduction, %",
        y="time saved, %",
        log_x=False,
        log_y=False,
    )
