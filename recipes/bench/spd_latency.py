"""Time saved by dropped and rounded reductions: TTFT and time per decoded token by the share of dropped blocks.

python -m recipes.bench spd_latency hosts=3 rate=100mbit latency_us=500
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Reduce
from longctx.cost.reduction import message_bytes, reduction_seconds, spd_reducing_seconds
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, refuse_unfit_shape, within
from recipes.bench import timing
from recipes.bench.hosts import DEFAULT_RATE, bits_per_s, is_host, refuse_links, run_on_hosts
from recipes.bench.phases import PhaseCost, median_cost, time_phases
from recipes.bench.rounded import Rival, read_rivals
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.plots import draw_lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime

PHASES = ("prefill", "decode")
EXACT = Reduce()


@dataclass(frozen=True)
class LatencySettings:
    """Top-level settings of configs/bench/spd_latency.yaml; the first of ``shares`` is 0."""

    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)] = (0, 0.5, 0.7, 1)
    tokens: PositiveInt = 128
    new_tokens: PositiveInt = 8
    rounds: PositiveInt = 5
    hosts: NonNegativeInt = 0
    rate: str = DEFAULT_RATE
    latency_us: NonNegativeFloat = 0
    out: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        if self.shares[0] != 0:
            raise ValueError(f"shares={list(self.shares)} does not begin with the baseline: put 0 first")


@dataclass(frozen=True)
class LatencyJob:
    """The inputs of every rank; ``tokens`` is the prompt."""

    settings: LatencySettings
    target: Target
    tokens: tuple[int, ...]
    rivals: tuple[Rival, ...] = ()

    @property
    def cases(self) -> list[tuple[Reduce, float]]:
        """The cases to time, as pairs of reductions' dtypes and share of dropped blocks; the first is the baseline."""
        return [(reduce, share) for reduce in (EXACT, *self.rivals) for share in self.settings.shares]


@dataclass(frozen=True)
class Links:
    """Constants of the links between ranks: seconds of a hop, and bytes per second."""

    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class LatencyTimes:
    """Measured costs, and the constants of the links.

    ``by_case[case][round]`` has the `PhaseCost` of each phase by name; `LatencyJob.cases` has the cases.
    """

    by_case: list[list[dict[str, PhaseCost]]]
    links: Links


@dataclass(frozen=True)
class LatencyRow:
    """A row of the result: the median `PhaseCost` of a phase in one case, and relative savings against the baseline.

    ``reduce`` is the rival's label, or float32.  ``share`` is the share of dropped blocks, rounded to whole blocks.
    ``rounds`` are the seconds by round.  Savings are fractions; the ``predicted_`` ones follow from bytes and hops.
    """

    phase: str
    reduce: str
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
    plain = as_config({name: value for name, value in as_dict(config).items() if name != "rivals"})
    settings = top_level(plain, LatencySettings)
    unused = ("ulysses", "ring", "dp", "pp")
    target = resolve_target(config, "recipes.bench spd_latency", unused_axes=unused, spd="refuse")
    mesh, dtype = target.mesh, target.model.dtype
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: one rank has no reduction to drop; use mesh.tp=2 or more")
    if dtype != "float32":
        raise ValueError(f"model.dtype={dtype}: bytes are counted for float32 only; use model.dtype=float32")
    refuse_unfit_shape(target.shape)
    if target.shape.norms != "pre":
        raise ValueError(
            "spd_latency predicts no bytes for a model that normalises the output of attention: "
            "use a model like Llama or Qwen"
        )
    refuse_links(settings.hosts, settings.rate, settings.latency_us, mesh)
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    timing.refuse_beyond_model(target, tokens=settings.tokens, new_tokens=settings.new_tokens)
    tokens = timing.read_tokens(target, "tokens", settings.tokens)
    return LatencyJob(settings, target, tokens, read_rivals(config))


def run_rank(rank: Rank, job: LatencyJob) -> LatencyTimes:
    """Time prefill and decoding in every case, then measure the links; every rank runs this.

    Calls, bytes and links are those of this rank; the first rank's are reported.
    """
    from longctx.megatron.reduce import set_reductions
    from longctx.megatron.spd.layer import follow_plan

    settings, layers, tp = job.settings, job.target.shape.layers, job.target.mesh.tp
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = job.target.load_engine(runtime, SPDPlan(layers, tp))
        progress.start("cases, runs", len(job.cases) * (settings.rounds + 1))

        def measure(case: tuple[Reduce, float]) -> dict[str, PhaseCost]:
            reduce, share = case
            follow_plan(engine.model, SPDPlan(layers, tp, within(range(layers), share)))
            set_reductions(engine.model, engine.tp, reduce)
            return time_phases(runtime, engine, job.tokens, settings.new_tokens)

        of_cases = timing.measure_in_rounds(job.cases, settings.rounds, measure, progress.step)
        return LatencyTimes([of_case.timed for of_case in of_cases], measure_links(runtime, job))


def measure_links(runtime: Runtime, job: LatencyJob) -> Links:
    """Return the links' constants: the hop from an all-reduce of 4 bytes, the bandwidth from one of a prefill's size.

    The bandwidth of emulated links is their nominal rate.  All tensor-parallel ranks call this.
    """
    from longctx.parallel.measure.all_reduce import time_all_reduce

    ranks, settings = job.target.mesh.tp, job.settings
    size = message_bytes(settings.tokens, job.target.shape.hidden, "float32")
    short = time_all_reduce(runtime.groups.tp, 4, 20, runtime.device)
    hop_s = short / (2 * (ranks - 1))
    if settings.hosts:
        return Links(hop_s, bits_per_s(settings.rate) / 8)
    long = time_all_reduce(runtime.groups.tp, size, 20, runtime.device)
    return Links(hop_s, 2 * (ranks - 1) / ranks * size / max(1e-9, long - short))


def compare_cases(times: LatencyTimes, job: LatencyJob) -> list[LatencyRow]:
    """Return a row for every phase and case: medians, savings against the first case, and predicted savings."""
    table_rows, layers = [], job.target.shape.layers
    for phase in PHASES:
        medians = [median_cost([costs[phase] for costs in rounds]) for rounds in times.by_case]
        base, all_exact = medians[0], predict_reducing(EXACT, 0, phase, times.links, job)
        for (reduce, share), rounds, cost in zip(job.cases, times.by_case, medians, strict=True):
            dropped = len(within(range(layers), share)) / layers
            reducing = predict_reducing(reduce, dropped, phase, times.links, job)
            table_rows.append(
                LatencyRow(
                    phase=phase,
                    reduce=reduce.label if isinstance(reduce, Rival) else "float32",
                    share=dropped,
                    **vars(cost),
                    rounds=[costs[phase].seconds for costs in rounds],
                    saved=1 - cost.seconds / base.seconds,
                    predicted_saved=(all_exact - reducing) / base.seconds,
                    reducing_saved=1 - cost.reducing / base.reducing,
                    predicted_reducing_saved=1 - reducing / all_exact,
                    bytes_saved=1 - cost.bytes / base.bytes,
                )
            )
    return table_rows


def predict_reducing(reduce: Reduce, dropped: float, phase: str, links: Links, job: LatencyJob) -> float:
    """Return the predicted seconds of all blocks' reductions in ``phase``.

    A share ``dropped`` of the blocks leaves out the first reduction; ``reduce`` has the dtypes of the remaining
    ones.  The time follows from bytes and hops alone.  The embedding's reduction is left out.
    """
    tokens, shape = job.settings.tokens if phase == "prefill" else 1, job.target.shape

    def seconds(dtype: str, states: int = 1) -> float:
        hops = (job.target.mesh.tp, links.hop_s, links.bytes_per_s)
        return reduction_seconds(states * tokens, shape.hidden, *hops, dtype, reduce.group)

    both_s = None if shape.norms == "pre" else seconds(reduce.mlp, 2)
    return spd_reducing_seconds(shape.layers, dropped, seconds(reduce.attention), seconds(reduce.mlp), both_s)


def show(table_rows: list[LatencyRow]) -> None:
    """Print times and savings of each phase and case as a table."""
    columns = (
        "phase",
        "messages",
        "dropped",
        "ms",
        "saved",
        "predicted",
        "reductions",
        "their ms",
        "saved",
        "predicted",
    )
    table = Table(*columns, box=None)
    for row in table_rows:
        times = (f"{row.seconds * 1e3:,.1f}", f"{row.saved:.1%}", f"{row.predicted_saved:.1%}")
        reductions = (f"{row.calls:.0f}", f"{row.reducing * 1e3:,.1f}", f"{row.reducing_saved:.1%}")
        table.add_row(
            row.phase, row.reduce, f"{row.share:.0%}", *times, *reductions, f"{row.predicted_reducing_saved:.1%}"
        )
    console.print(table)


def draw(table_rows: list[LatencyRow], job: LatencyJob, links: str, picture: str) -> None:
    """Draw measured and predicted savings by share of dropped blocks, without rivals, to the file ``picture``.

    ``links`` is the title's text about the links.
    """
    series = {}
    for phase in PHASES:
        of_phase = [row for row in table_rows if (row.phase, row.reduce) == (phase, "float32")]
        series[f"{phase}, measured"] = [100 * row.saved for row in of_phase]
        series[f"{phase}, from bytes and hops"] = [100 * row.predicted_saved for row in of_phase]
    draw_lines(
        picture,
        [100 * row.share for row in table_rows if (row.phase, row.reduce) == ("prefill", "float32")],
        series,
        title=f"{job.target.model.name} at TP={job.target.mesh.tp}, {links}: time saved",
        x="blocks that drop a reduction, %",
        y="time saved, %",
        log_x=False,
        log_y=False,
    )


def report(job: LatencyJob, times: LatencyTimes) -> None:
    """Print the savings, and write and draw them to the files that the settings name."""
    settings, target = job.settings, job.target
    table_rows = compare_cases(times, job)
    show(table_rows)
    nominal = {"rate": settings.rate, "latency_us": settings.latency_us} if settings.hosts else {"rate": "loopback"}
    if settings.out:
        inputs = {"model": target.model.name, "mesh": str(target.mesh), "hosts": settings.hosts, **nominal}
        inputs["rivals"] = {rival.label: rival.settings for rival in job.rivals}
        result = {**inputs, **asdict(times.links), "tokens": settings.tokens, **provenance()}
        write_result(settings.out, {**result, "rows": [asdict(row) for row in table_rows]})
    if settings.picture:
        links = f"{settings.rate}, {settings.latency_us:g} us" if settings.hosts else "loopback"
        draw(table_rows, job, links, settings.picture)


def task(config: DictConfig) -> None:
    """Run the ranks and report rank 0's times; with ``hosts``, run this command on an emulated host per rank."""
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
