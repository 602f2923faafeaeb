"""Time to first token (TTFT) by miss rate T / (T + P): pass-KV and pass-Q side by side, and each rule's choice.

    python -m recipes.bench crossover out=crossover.json picture=crossover.svg
    python -m recipes.bench crossover hosts=4 mesh.ring=4 rate=100mbit

The grid of arXiv 2411.01783, Table 4, with the whole model, over the ranks' own links or over emulated ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import torch
import yaml
from omegaconf import DictConfig
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.cost.attention import Work
from longctx.cost.choice import RULES, choose, fit_empirical
from longctx.cost.hardware import Hardware
from longctx.parallel.launch import Rank
from longctx.shapes import Int, Tensor
from longctx.text_file import write_text
from recipes.bench.hosts import is_host, refuse_hosts, run_on_hosts
from recipes.bench.timing import make_random_cache, measure_in_rounds, read_tokens, time_on_ranks
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.hardware_file import read_hardware, refuse_other_threads
from recipes.common.places import refuse_unwritable
from recipes.common.plots import draw_lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.strategy_choice import measure_ring
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine

STRATEGIES = ("pass_kv", "pass_q")
WARM = (
    "longctx.infer.engine", "longctx.infer.session", "longctx.parallel.measure.probe", "recipes.common.progress",
)  # fmt: skip
ABBREVIATIONS = {"pass_kv": "KV", "pass_q": "Q"}


@dataclass(frozen=True)
class CrossoverSettings:
    """Top-level settings of configs/bench/crossover.yaml."""

    total: Annotated[int, Field(ge=16)] = 4096
    miss_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (
        0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0,
    )  # fmt: skip
    rounds: PositiveInt = 5
    hosts: NonNegativeInt = 0
    rate: str = "100mbit"
    hardware: str | None = None
    out: str | None = None
    picture: str | None = None
    fitted: str | None = None


@dataclass(frozen=True)
class CrossoverJob:
    """The inputs of every rank; without ``hardware`` the ranks measure its constants first."""

    settings: CrossoverSettings
    target: Target
    tokens: tuple[int, ...]
    hardware: Hardware | None


@dataclass(frozen=True)
class MissRateTimes:
    """The slowest rank's seconds of ``new`` tokens over ``cached`` ones, by strategy and round."""

    new: int
    cached: int
    seconds: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by strategy."""
        return {name: median(seconds) for name, seconds in self.seconds.items()}


@dataclass(frozen=True)
class RuleVerdict:
    """The strategy that a rule takes at a miss rate, and the share of time it loses to the faster one (0.1: 10 %)."""

    takes: str
    loses: float


@dataclass(frozen=True)
class MissRateRow:
    """A row of the result: the times at one miss rate, and the `RuleVerdict` of each rule by name.

    ``seconds`` are by strategy and round; ``pass_kv`` and ``pass_q`` are their medians.
    """

    new: int
    cached: int
    seconds: dict[str, list[float]]
    pass_kv: float
    pass_q: float
    miss_rate: float
    rules: dict[str, RuleVerdict]


def prepare(config: DictConfig) -> CrossoverJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, CrossoverSettings)
    target = resolve_target(config, "recipes.bench crossover", unused_axes=("tp", "ulysses", "dp", "pp"), spd="refuse")
    if target.mesh.ring < 2:
        raise ValueError(f"mesh.ring={target.mesh.ring}: one rank has no transfers to time; use mesh.ring=2 or more")
    if settings.hosts:
        refuse_hosts(settings.hosts, settings.rate, target.mesh)
    elif settings.rate != CrossoverSettings.rate:
        raise ValueError(
            f"rate={settings.rate} is for links between emulated hosts: set hosts={target.mesh.ring}, or leave it out"
        )
    for name in ("out", "picture", "fitted"):
        refuse_unwritable(getattr(settings, name), name)
    refuse_windows(target)
    tokens = read_tokens(target, "total", settings.total)
    hardware = read_hardware(settings.hardware) if settings.hardware else None
    refuse_other_threads(settings.hardware, target.run.threads, target.mesh, fixed=True)
    return CrossoverJob(settings, target, tokens, hardware)


def refuse_windows(target: Target) -> None:
    """Raise ValueError for a model with sliding windows: this benchmark times one strategy for all layers.

    Other recipes choose a strategy for each window separately.
    """
    if windows := [window for window in target.shape.windows if window]:
        raise ValueError(
            f"model={target.model.name} has layers with a window of {windows[0]:,} keys, for which recipes choose a "
            "strategy separately: use a model whose layers see all keys"
        )


def run_rank(rank: Rank, job: CrossoverJob) -> tuple[Hardware, list[MissRateTimes]]:
    """Return the machine's constants, and the TTFT of both strategies at every miss rate."""
    settings, table_rows = job.settings, []
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = job.target.load_engine(runtime)
        hardware = job.hardware or measure_ring(runtime, job.target)
        progress.start("miss rates, prefills", len(settings.miss_rates) * (settings.rounds + 1) * len(STRATEGIES))
        for rate in settings.miss_rates:
            new = max(1, round(rate * settings.total))
            times = time_strategies(engine, torch.tensor(job.tokens[:new]), settings, progress.step)
            table_rows.append(MissRateTimes(new, settings.total - new, times))
    return hardware, table_rows


def time_strategies(
    engine: Engine, tokens: Int[Tensor, " new"], settings: CrossoverSettings, done: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the TTFT of ``tokens`` by strategy and round: the slowest rank's seconds to the next logits.

    Random cached tokens precede ``tokens``, so that there are ``settings.total`` together.  ``done`` is called after
    each measurement, also those of the warm-up round.  Every rank must call this.
    """
    from longctx.attention.layout import zigzag
    from longctx.infer.engine import next_logits
    from longctx.infer.prefill import run_pass
    from longctx.parallel import strategy

    cache = make_random_cache(engine, settings.total - len(tokens), settings.total)
    before, layout = cache.layout, zigzag(len(tokens), engine.ring.size)

    def measure(name: str) -> float:
        def prefill() -> None:
            hidden = run_pass(engine, tokens, layout, cache, engine.everywhere(strategy.STRATEGIES[name]))
            next_logits(engine, hidden[-1:])

        seconds = time_on_ranks(engine.context, prefill)
        cache.rewind(before)
        return seconds

    times = measure_in_rounds(STRATEGIES, settings.rounds, measure, done)
    return {name: of_strategy.timed for name, of_strategy in zip(STRATEGIES, times, strict=True)}


def judge_rules(times: Sequence[MissRateTimes], job: CrossoverJob, hardware: Hardware) -> list[MissRateRow]:
    """Return a row for each of ``times``, with the `RuleVerdict` of each rule.

    The empirical rule of a row is fitted to the other rows.  If one strategy is at least as fast in all of them,
    nothing can be fitted, and the row has no verdict on the empirical rule.
    """
    others = ([*times[:i], *times[i + 1 :]] for i in range(len(times)))
    return [
        judge_row(each, job, replace(hardware, empirical=fit_rule(rest)))
        for each, rest in zip(times, others, strict=True)
    ]


def judge_row(times: MissRateTimes, job: CrossoverJob, hardware: Hardware) -> MissRateRow:
    """Return the row of ``times``, with the `RuleVerdict` of each rule.

    The empirical rule is left out if ``hardware`` has no fitted constants.
    """
    medians, shape = times.medians, job.target.shape
    work = Work(
        (times.new,),
        (times.cached,),
        job.target.mesh.ring,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        getattr(torch, job.target.model.dtype).itemsize,
    )
    rules = {}
    for rule in RULES:
        if rule == "empirical" and not hardware.empirical:
            continue
        strategy = choose(rule, work, hardware).strategy
        rules[rule] = RuleVerdict(strategy, medians[strategy] / min(medians.values()) - 1)
    return MissRateRow(
        **vars(times),
        pass_kv=medians["pass_kv"],
        pass_q=medians["pass_q"],
        miss_rate=times.new / job.settings.total,
        rules=rules,
    )


def fit_rule(times: Sequence[MissRateTimes]) -> tuple[float, float, float] | None:
    """Return alpha, beta and gamma of the empirical rule; None if one strategy is at least as fast in all ``times``."""
    points = [(each.new, each.cached, each.medians["pass_kv"], each.medians["pass_q"]) for each in times]
    try:
        return fit_empirical(points)
    except ValueError:
        return None


def show(table_rows: list[MissRateRow]) -> None:
    """Print the TTFT of pass-KV and pass-Q, and each rule's choice and loss, as a table."""
    rules = [rule for rule in RULES if any(rule in row.rules for row in table_rows)]
    table = Table(box=None)
    for column in ("T", "P", "miss", "KV ms", "Q ms", "KV/Q-1", *rules):
        table.add_column(column, justify="right")
    for row in table_rows:
        verdicts = [row.rules.get(rule) for rule in rules]
        choices = [f"{ABBREVIATIONS[verdict.takes]} {verdict.loses:+.1%}" if verdict else "" for verdict in verdicts]
        sizes = (f"{row.new:,}", f"{row.cached:,}", f"{row.miss_rate:.1%}")
        times = (f"{row.pass_kv * 1e3:,.1f}", f"{row.pass_q * 1e3:,.1f}", f"{row.pass_kv / row.pass_q - 1:+.1%}")
        table.add_row(*sizes, *times, *choices)
    console.print(table)


def report(job: CrossoverJob, hardware: Hardware, times: Sequence[MissRateTimes]) -> None:
    """Judge the rules by ``times`` and print the rows; write and draw them if ``out`` and ``picture`` are set.

    If ``fitted`` is set, write ``hardware`` to that file, with the empirical rule's constants fitted to all rows.  If
    none can be fitted, the file has the constants that ``hardware`` had.
    """
    settings, target = job.settings, job.target
    # 1. Judge each row by the others, and fit the constants of the files to all rows.
    constants = fit_rule(times)
    if constants is None:
        console.print(
            "no empirical rule is fitted, since one strategy is at least as fast in every row: add miss_rates at which "
            "the other one is faster"
        )
    table_rows = judge_rules(times, job, hardware)
    show(table_rows)
    hardware = replace(hardware, empirical=constants or hardware.empirical)
    # 2. Write and draw.
    links = {"mesh": str(target.mesh), "hosts": settings.hosts, "rate": settings.rate if settings.hosts else None}
    if settings.out:
        inputs = {"model": target.model.name, **links, "total": settings.total, "hardware": asdict(hardware)}
        write_result(settings.out, {**provenance(), **inputs, "rows": [asdict(row) for row in table_rows]})
    if settings.fitted:
        measured = {"threads": target.run.threads, "model": target.model.name, "dtype": target.model.dtype}
        file = {"measured": {**provenance(), **links, **measured}, **asdict(hardware)}
        if settings.hardware:  # all other constants, and what is known of them, are those of that file
            given = yaml.safe_load(Path(settings.hardware).expanduser().read_text(encoding="utf-8"))
            origin = {**(given.get("measured") or {}), **({"empirical": file["measured"]} if constants else {})}
            file = {**given, "measured": origin, "empirical": file["empirical"]}
        write_text(Path(settings.fitted), yaml.safe_dump(file, sort_keys=False))
    if settings.picture:
        draw(table_rows, job, settings.picture)


def draw(table_rows: list[MissRateRow], job: CrossoverJob, picture: str) -> None:
    """Draw the TTFT of both strategies against the miss rate, with their crossings marked, to the file ``picture``."""
    table_rows = sorted(table_rows, key=lambda row: row.miss_rate)  # neighbours have a crossing between them
    rates, faster = [row.miss_rate for row in table_rows], [row.pass_kv < row.pass_q for row in table_rows]
    links = f", {job.settings.rate} links" if job.settings.hosts else ""
    draw_lines(
        picture,
        rates,
        {"pass-KV": [row.pass_kv * 1e3 for row in table_rows], "pass-Q": [row.pass_q * 1e3 for row in table_rows]},
        title=f"{job.target.model.name}, {job.settings.total:,} tokens of context, {job.target.mesh}{links}",
        x="miss rate T / (T + P)",
        y="time to first token, ms",
        marked=[(rates[i] * rates[i + 1]) ** 0.5 for i in range(len(table_rows) - 1) if faster[i] != faster[i + 1]],
        marked_label="crossover, between the rows on either side",
    )
    console.print(f"drawn to {picture}")


def task(config: DictConfig) -> None:
    """Run the ranks and report rank 0's times; with ``hosts``, run this command on an emulated host per rank."""
    if not config.hosts:
        warm_up_ranks(WARM)
    job = prepare(config)
    if job.settings.hosts and not is_host():
        run_on_hosts(job.settings.hosts, job.settings.rate, [sys.executable, *sys.orig_argv[1:]])
        return
    result = on_ranks(job.target.mesh, run_rank, job)
    if result is not None:
        report(job, *result)
