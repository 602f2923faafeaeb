"""Time to first token over the miss rate T / (T + P): pass-KV and pass-Q side by side, and what each rule takes.

    python -m recipes.bench crossover out=crossover.json picture=crossover.svg
    python -m recipes.bench crossover hosts=4 mesh.ring=4 rate=100mbit

The grid of arXiv 2411.01783, Table 4, with the whole model, on whatever links the ranks have, or on emulated ones.
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import yaml
from omegaconf import DictConfig
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import ModelSource, PromptSource
from longctx.cost.attention import Work
from longctx.cost.choice import RULES, choose, fit_empirical
from longctx.cost.hardware import Hardware
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import tokenizer_of
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from recipes.bench.hosts import is_host, refuse_hosts, run_on_hosts
from recipes.calibrate import measure_ring
from recipes.common.cli import console, on_ranks, refuse_unwritable, warm_up_ranks, write_result
from recipes.common.hardware_file import read_hardware, refuse_other_threads
from recipes.common.plots import lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

STRATEGIES = ("pass_kv", "pass_q")
THREADS = 1  # of a rank
WARM = (
    "longctx.infer.engine", "longctx.infer.session", "longctx.parallel.measure.probe", "recipes.common.progress",
)  # fmt: skip
SHORT = {"pass_kv": "KV", "pass_q": "Q"}


@dataclass(frozen=True)
class CrossoverSettings:
    """The settings of configs/bench_crossover.yaml that are not a section of their own."""

    total: Annotated[int, Field(ge=16)]
    miss_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    rounds: PositiveInt
    hosts: NonNegativeInt
    rate: str
    hardware: str | None
    out: str | None
    picture: str | None
    fitted: str | None


@dataclass(frozen=True)
class CrossoverJob:
    """What every rank needs to know."""

    settings: CrossoverSettings
    target: Target
    tokens: tuple[int, ...]
    hardware: Hardware | None


def run_rank(rank: Rank, job: CrossoverJob) -> tuple[Hardware, list[dict[str, Any]]]:
    """The machine's constants, then every row: the strategies in turn within each round."""
    with job.target.runtime(rank) as here, Progress(shown=rank.rank == 0) as progress:
        engine = job.target.load_engine(here)
        on = job.hardware or measure_ring(here, job.target)
        progress.start("miss rates, prefills", len(job.settings.miss_rates) * (job.settings.rounds + 1) * 2)
        rows = []
        for rate in job.settings.miss_rates:
            new = max(1, round(rate * job.settings.total))
            times = timed(engine, torch.tensor(job.tokens[:new]), job.settings, progress)
            rows.append({"new": new, "cached": job.settings.total - new, "seconds": times})
    return on, rows


def timed(engine: Any, tokens: torch.Tensor, settings: CrossoverSettings, progress: Progress) -> dict[str, list[float]]:
    """Seconds from the tokens to the next one's logits, of the slowest rank, by strategy and round."""
    from longctx.attention.layout import zigzag
    from longctx.infer.prefill import run_pass
    from longctx.infer.session import barrier, next_logits
    from longctx.parallel import strategy

    cache = filled(engine, settings.total - len(tokens), settings.total)
    before, layout = cache.layout, zigzag(len(tokens), engine.ring.size)
    times: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for warm in [False] + [True] * settings.rounds:
        for name, taken in times.items():
            barrier(engine)
            began = time.perf_counter()
            hidden = run_pass(engine, tokens, layout, cache, engine.everywhere(strategy.STRATEGIES[name]))
            next_logits(engine, hidden[-1:])
            mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            told = torch.cat(engine.context.all_gather(mine, [(1,)] * engine.ranks))
            cache.rewind(before)
            progress.step()
            if warm:
                taken.append(float(told.max()))
    return times


def filled(engine: Any, cached: int, room: int) -> Any:
    """A cache of ``cached`` random rows."""
    from longctx.attention.layout import zigzag

    cache = engine.cache(room)
    cache.extend(zigzag(cached, engine.ring.size))
    shape = (1, cache.rows, engine.shape.kv_heads, engine.shape.head_dim)
    dtype = next(engine.model.parameters()).dtype
    for layer in range(engine.shape.layers):
        cache.append(layer, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))
    return cache


def judged(rows: list[dict[str, Any]], job: CrossoverJob, on: Hardware) -> list[dict[str, Any]]:
    """``rows`` with their medians, and what each rule takes and loses to the better strategy.

    The empirical rule is fitted to the other rows; where these have no crossover, it says nothing.
    """
    others = ([*rows[:i], *rows[i + 1 :]] for i in range(len(rows)))
    return [judged_row(row, job, replace(on, empirical=fitted(rest))) for row, rest in zip(rows, others, strict=True)]


def judged_row(row: dict[str, Any], job: CrossoverJob, on: Hardware) -> dict[str, Any]:
    """``row`` with its medians, and what each rule that has its constants in ``on`` takes and loses."""
    took = {name: median(seconds) for name, seconds in row["seconds"].items()}
    shape, element = job.target.shape, getattr(torch, job.target.model.dtype).itemsize
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    work = Work((row["new"],), (row["cached"],), job.target.mesh.ring, *heads, element)
    rules = {}
    for rule in RULES:
        if rule == "empirical" and not on.empirical:
            continue
        taken = choose(rule, work, on).strategy
        rules[rule] = {"takes": taken, "loses": took[taken] / min(took.values()) - 1}
    return {**row, **took, "miss_rate": row["new"] / job.settings.total, "rules": rules}


def fitted(rows: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """The empirical rule's constants for ``rows``; None where these have no crossover to fit."""
    points = [(row["new"], row["cached"], *(median(row["seconds"][name]) for name in STRATEGIES)) for row in rows]
    try:
        return fit_empirical(points)
    except ValueError:
        return None


def show(rows: list[dict[str, Any]]) -> None:
    """Both strategies' TTFT, and the rules, as a table."""
    rules = [rule for rule in RULES if any(rule in row["rules"] for row in rows)]
    table = Table(box=None)
    for column in ("T", "P", "miss", "KV ms", "Q ms", "KV/Q-1", *rules):
        table.add_column(column, justify="right")
    for row in rows:
        kv, q = row["pass_kv"], row["pass_q"]
        says = [row["rules"].get(rule) for rule in rules]
        taken = [f"{SHORT[said['takes']]} {said['loses']:+.1%}" if said else "" for said in says]
        sizes = (f"{row['new']:,}", f"{row['cached']:,}", f"{row['miss_rate']:.1%}")
        table.add_row(*sizes, f"{kv * 1e3:,.1f}", f"{q * 1e3:,.1f}", f"{kv / q - 1:+.1%}", *taken)
    console.print(table)


def prepare_crossover(config: DictConfig) -> CrossoverJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, CrossoverSettings)
    if not settings.hosts:
        warm_up_ranks(WARM)
    target = resolve_target(config, "recipes.bench crossover", unused_axes=("tp", "ulysses", "dp", "pp"), spd="refuse")
    if target.mesh.ring < 2:
        raise ValueError(f"mesh.ring={target.mesh.ring}: nothing travels on one rank, use mesh.ring=2 or more")
    if settings.hosts:
        refuse_hosts(settings.hosts, settings.rate, target.mesh)
    for name in ("out", "picture", "fitted"):
        refuse_unwritable(getattr(settings, name), name)
    refuse_windows(target.model, target.shape)
    source = PromptSource(pydoc="all", tokens=settings.total)
    tokens, available = prompt_tokens(source, tokenizer_of(target.folder))
    if available < settings.total:
        raise ValueError(f"total={settings.total}: the text has {available:,} tokens; use at most that")
    hardware = read_hardware(settings.hardware) if settings.hardware else None
    refuse_other_threads(settings.hardware, THREADS, target.mesh)
    return CrossoverJob(settings, target, tuple(tokens), hardware)


def refuse_windows(model: ModelSource, shape: ModelShape) -> None:
    """Raise ValueError for layers with a window: recipes choose for each window, and one strategy is timed here."""
    if windows := [window for window in shape.windows if window]:
        raise ValueError(
            f"model={model.name} has layers that see {windows[0]:,} keys, and recipes choose a strategy for them "
            "separately: use a model whose layers see all keys"
        )


def task(config: DictConfig) -> None:
    """Measure; write, draw and show what the first rank gives."""
    job = prepare_crossover(config)
    if job.settings.hosts and not is_host():
        run_on_hosts(job.settings.hosts, job.settings.rate, [sys.executable, *sys.orig_argv[1:]])
        return
    given = on_ranks(job.target.mesh, run_rank, job)
    if given is not None:
        report(job, *given)


def report(job: CrossoverJob, on: Hardware, measured_rows: list[dict[str, Any]]) -> None:
    """Judge the rules by ``measured_rows``; show, write and draw."""
    settings, constants = job.settings, fitted(measured_rows)
    if constants is None:
        console.print("no empirical rule: one strategy won every row, measure further to either side of the crossover")
    rows = judged(measured_rows, job, on)
    show(rows)
    on = replace(on, empirical=constants or on.empirical)
    where = {"mesh": str(job.target.mesh), "hosts": settings.hosts, "rate": settings.rate if settings.hosts else None}
    about = {**provenance(), "model": job.target.model.name, **where, "total": settings.total, "hardware": asdict(on)}
    if settings.out:
        write_result(settings.out, {**about, "rows": rows})
    if settings.fitted:
        how = {"threads": THREADS, "model": job.target.model.name, "dtype": job.target.model.dtype}
        file = {"measured": {**provenance(), **where, **how}, **asdict(on)}
        Path(settings.fitted).write_text(yaml.safe_dump(file, sort_keys=False))
    if settings.picture:
        draw(rows, job)


def draw(rows: list[dict[str, Any]], job: CrossoverJob) -> None:
    """TTFT over the miss rate, both strategies, with the crossings marked."""
    rates = [row["miss_rate"] for row in rows]
    kv, q = ([row[name] * 1e3 for row in rows] for name in STRATEGIES)
    crossings = [
        (rates[i] * rates[i + 1]) ** 0.5 for i in range(len(rows) - 1) if (kv[i] < q[i]) != (kv[i + 1] < q[i + 1])
    ]
    links = f", {job.settings.rate} links" if job.settings.hosts else ""
    lines(
        str(job.settings.picture),
        rates,
        {"pass-KV": kv, "pass-Q": q},
        title=f"{job.target.model.name}, {job.settings.total:,} tokens of context, {job.target.mesh}{links}",
        x="miss rate T / (T + P)",
        y="time to first token, ms",
        marked=crossings,
        mark="they cross between the rows beside it",
    )
    console.print(f"drawn to {job.settings.picture}")
