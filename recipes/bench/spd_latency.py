"""Time saved by dropped reductions: TTFT and time per decoded token over the share of blocks that drop one.

python -m recipes.bench spd_latency hosts=3 rate=100mbit latency_us=500
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Context, Sampling
from longctx.cost.reduction import all_reduce_seconds, communication_saved, spd_forward_seconds
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, refuse_unfit_shape, within
from recipes.bench import timing
from recipes.bench.hosts import bits_per_s, is_host, refuse_hosts, run_on_hosts
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.plots import draw_lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.megatron.runtime import Runtime

PHASES = ("prefill", "decode")
ELEMENT = 4  # bytes of a float32


@dataclass(frozen=True)
class LatencySettings:
    """Settings of configs/bench/spd_latency.yaml outside any section; the first of ``shares`` is 0."""

    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)] = (0, 0.5, 0.7, 1)
    tokens: PositiveInt = 128
    new_tokens: PositiveInt = 8
    rounds: PositiveInt = 5
    hosts: NonNegativeInt = 0
    rate: str = "100mbit"
    latency_us: NonNegativeFloat = 0
    out: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.shares[0] != 0:
            raise ValueError(f"shares={list(self.shares)}: start with 0, the baseline")


@dataclass(frozen=True)
class LatencyJob:
    """The inputs of every rank; ``tokens`` is the prompt."""

    settings: LatencySettings
    target: Target
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PhaseCost:
    """Cost of a prefill, or of one decoded token: the slowest rank's ``seconds``, and this rank's all-reduces.

    ``reducing`` is the least time that any rank spent in all-reduces.  A rank that arrives early also waits inside
    them, so the rank that arrives last shows how long the reductions themselves take.
    """

    seconds: float
    reducing: float
    calls: float
    bytes: float


@dataclass(frozen=True)
class Links:
    """Constants of the links between ranks: seconds of a hop, and bytes per second."""

    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class LatencyTimes:
    """Costs by share and round, each by phase, and the links' constants."""

    by_share: list[list[dict[str, PhaseCost]]]
    links: Links


@dataclass(frozen=True)
class LatencyRow:
    """A row of the result: medians of a phase with a share of blocks dropped, and relative savings against share 0.

    ``rounds`` are the seconds by round.  The ``predicted_`` savings follow from bytes and hops.
    """

    phase: str
    share: float
    seconds: float
    reducing: float
    calls: float
    bytes: float
    rounds: list[float]
    saved: float
    predicted_saved: float
    reducing_saved: float
    predicted_reducing_saved: float
    bytes_saved: float


def prepare(config: DictConfig) -> LatencyJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, LatencySettings)
    unused = ("ulysses", "ring", "dp", "pp")
    target = resolve_target(config, "recipes.bench spd_latency", unused_axes=unused, spd="refuse")
    mesh, dtype = target.mesh, target.model.dtype
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: one rank has no reduction to drop, use mesh.tp=2 or more")
    if dtype != "float32":
        raise ValueError(f"model.dtype={dtype}: bytes are counted for float32 only; use model.dtype=float32")
    refuse_unfit_shape(target.shape)
    if target.shape.norms != "pre":
        raise ValueError(
            "this model normalises the output of attention, for which spd_latency predicts no bytes: "
            "use a model like Llama or Qwen"
        )
    if settings.hosts:
        refuse_hosts(settings.hosts, settings.rate, mesh)
    elif (settings.latency_us, settings.rate) != (0, LatencySettings.rate):
        links = f"latency_us={settings.latency_us} and rate={settings.rate}"
        raise ValueError(f"{links} are of links between emulated hosts: set hosts={mesh.tp}")
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    timing.refuse_beyond_model(target, tokens=settings.tokens, new_tokens=settings.new_tokens)
    return LatencyJob(settings, target, timing.read_tokens(target, "tokens", settings.tokens))


def run_rank(rank: Rank, job: LatencyJob) -> LatencyTimes:
    """Time both phases at every share on one rank; the first rank's all-reduces are reported."""
    from longctx.megatron.spd.layer import follow_plan

    settings, layers, tp = job.settings, job.target.shape.layers, job.target.mesh.tp
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = job.target.load_engine(runtime, SPDPlan(layers, tp))
        progress.start("shares, runs", len(settings.shares) * (settings.rounds + 1))

        def measure(share: float) -> dict[str, PhaseCost]:
            follow_plan(engine.model, SPDPlan(layers, tp, within(range(layers), share)))
            return time_phases(runtime, engine, job)

        of_shares = timing.measure_in_rounds(settings.shares, settings.rounds, measure, progress.step)
        return LatencyTimes([of_share.timed for of_share in of_shares], measure_links(runtime, job))


def time_phases(runtime: Runtime, engine: Engine, job: LatencyJob) -> dict[str, PhaseCost]:
    """Return the cost of the prompt's prefill, and of each token decoded after it."""
    from longctx.infer.session import Session

    session = Session(engine, Context(), Sampling())

    def prefill() -> None:
        session.turn({0: job.tokens}, {0: 1})

    def decode() -> None:
        for _ in range(job.settings.new_tokens):
            session.decode([0])

    prefill_cost = measure_phase(runtime, prefill, 1)
    return {"prefill": prefill_cost, "decode": measure_phase(runtime, decode, job.settings.new_tokens)}


def measure_phase(runtime: Runtime, work: Callable[[], None], steps: int) -> PhaseCost:
    """Start ``work``, of ``steps`` equal steps, on all ranks at once and return the cost per step."""
    from longctx.parallel.measure.all_reduce import count_all_reduces

    timing.barrier(runtime.world)
    with count_all_reduces() as tally:
        elapsed = timing.measure_seconds(work)
    seconds, reducing = timing.gather_numbers(runtime.world, elapsed / steps, tally.seconds / steps)
    return PhaseCost(max(seconds), min(reducing), tally.calls / steps, tally.bytes / steps)


def measure_links(runtime: Runtime, job: LatencyJob) -> Links:
    """Measure a hop by the shortest all-reduce, and the bandwidth by one of a prefill's size.

    The bandwidth of emulated links is their nominal rate.
    """
    from longctx.parallel.measure.all_reduce import time_all_reduce

    ranks, settings = job.target.mesh.tp, job.settings
    size = settings.tokens * job.target.shape.hidden * ELEMENT
    short = time_all_reduce(runtime.groups.tp, 4, 20, runtime.device)
    hop_s = short / (2 * (ranks - 1))
    if settings.hosts:
        return Links(hop_s, bits_per_s(settings.rate) / 8)
    long = time_all_reduce(runtime.groups.tp, size, 20, runtime.device)
    return Links(hop_s, 2 * (ranks - 1) / ranks * size / max(1e-9, long - short))


def compare_shares(times: LatencyTimes, job: LatencyJob) -> list[LatencyRow]:
    """Return a row for every phase and share: medians, savings against no dropped block, and predicted savings."""
    target, table_rows = job.target, []
    layers, links = target.shape.layers, times.links
    for phase in PHASES:
        # 1. The cost model's all-reduce of this phase.
        size = (job.settings.tokens if phase == "prefill" else 1) * target.shape.hidden * ELEMENT
        reduction_s = all_reduce_seconds(size, target.mesh.tp, links.hop_s, links.bytes_per_s)
        # 2. Every share against the first, which drops nothing.
        medians = [median_cost([costs[phase] for costs in rounds]) for rounds in times.by_share]
        base = medians[0]
        for share, rounds, cost in zip(job.settings.shares, times.by_share, medians, strict=True):
            dropped = len(within(range(layers), share)) / layers
            predicted = spd_forward_seconds(base.seconds, layers, dropped, reduction_s)
            table_rows.append(
                LatencyRow(
                    phase=phase,
                    share=dropped,
                    **vars(cost),
                    rounds=[costs[phase].seconds for costs in rounds],
                    saved=1 - cost.seconds / base.seconds,
                    predicted_saved=1 - predicted / base.seconds,
                    reducing_saved=1 - cost.reducing / base.reducing,
                    predicted_reducing_saved=communication_saved(dropped),
                    bytes_saved=1 - cost.bytes / base.bytes,
                )
            )
    return table_rows


def median_cost(costs: list[PhaseCost]) -> PhaseCost:
    """Return the median of each field of ``costs``."""
    return PhaseCost(*(median(getattr(cost, name) for cost in costs) for name in vars(costs[0])))


def show(table_rows: list[LatencyRow]) -> None:
    """Print times and savings of each phase and share as a table."""
    columns = ("phase", "dropped", "ms", "saved", "predicted", "all-reduces", "their ms", "saved", "p/2")
    table = Table(*columns, box=None)
    for row in table_rows:
        times = (f"{row.seconds * 1e3:,.1f}", f"{row.saved:.1%}", f"{row.predicted_saved:.1%}")
        reductions = (f"{row.calls:.0f}", f"{row.reducing * 1e3:,.1f}", f"{row.reducing_saved:.1%}")
        table.add_row(row.phase, f"{row.share:.0%}", *times, *reductions, f"{row.predicted_reducing_saved:.1%}")
    console.print(table)


def draw(table_rows: list[LatencyRow], job: LatencyJob, links: str, picture: str) -> None:
    """Draw measured and predicted savings of both phases over the share of dropped blocks to the file ``picture``."""
    series = {}
    for phase in PHASES:
        of_phase = [row for row in table_rows if row.phase == phase]
        series[f"{phase}, measured"] = [100 * row.saved for row in of_phase]
        series[f"{phase}, from bytes and hops"] = [100 * row.predicted_saved for row in of_phase]
    draw_lines(
        picture,
        [100 * row.share for row in table_rows if row.phase == "prefill"],
        series,
        title=f"{job.target.model.name} at TP={job.target.mesh.tp}, {links}: time saved",
        x="blocks that drop a reduction, %",
        y="time saved, %",
        log_x=False,
        log_y=False,
    )


def report(job: LatencyJob, times: LatencyTimes) -> None:
    """Show, write and draw the savings."""
    settings, target = job.settings, job.target
    table_rows = compare_shares(times, job)
    show(table_rows)
    nominal = {"rate": settings.rate, "latency_us": settings.latency_us} if settings.hosts else {"rate": "loopback"}
    if settings.out:
        inputs = {"model": target.model.name, "mesh": str(target.mesh), "hosts": settings.hosts, **nominal}
        result = {**inputs, **asdict(times.links), "tokens": settings.tokens, **provenance()}
        write_result(settings.out, {**result, "rows": [asdict(row) for row in table_rows]})
    if settings.picture:
        links = f"{settings.rate}, {settings.latency_us:g} us" if settings.hosts else "loopback"
        draw(table_rows, job, links, settings.picture)


def task(config: DictConfig) -> None:
    """Run the ranks, then report the first rank's times; with ``hosts``, start an emulated host per rank first."""
    if not config.hosts:
        warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    job = prepare(config)
    settings = job.settings
    if settings.hosts and not is_host():
        run_on_hosts(settings.hosts, settings.rate, [sys.executable, *sys.orig_argv[1:]], settings.latency_us)
        return
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is not None:
        report(job, times)
