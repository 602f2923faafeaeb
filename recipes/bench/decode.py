"""Time to incremental token (TTIT) over a sharded cache: each decode strategy and one rank, side by side in one run.

python -m recipes.bench decode
python -m recipes.bench decode strategies=[sharded] dropped=[0.5] hosts=2 latency_us=500
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Context, Sampling
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, least_budget, refuse_unfit_shape, within
from recipes.bench.hosts import DEFAULT_RATE, is_host, refuse_links, run_on_hosts
from recipes.bench.timing import barrier, make_random_cache, measure_in_rounds, measure_seconds
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.infer.session import Session
    from longctx.megatron.runtime import Runtime

Strategy = Literal["sharded", "gather_merge", "pass_q", "pass_kv", "all_gather_kv"]
STRATEGIES: tuple[Strategy, ...] = ("sharded", "gather_merge", "pass_q", "pass_kv", "all_gather_kv")
ONE_RANK = "one rank"


@dataclass(frozen=True)
class DecodeSettings:
    """Top-level settings of configs/bench/decode.yaml; ``dropped`` adds a variant for each of its shares."""

    cached: PositiveInt = 4096
    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    tokens: PositiveInt = 8
    rounds: PositiveInt = 3
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = STRATEGIES
    dropped: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    hosts: NonNegativeInt = 0
    rate: str = DEFAULT_RATE
    latency_us: NonNegativeFloat = 0
    out: str | None = None


@dataclass(frozen=True)
class DecodeJob:
    """The inputs of the benchmark that every rank gets."""

    settings: DecodeSettings
    target: Target


@dataclass(frozen=True)
class Variant:
    """A way to decode that is timed: engine, context settings (with the strategy), and share of dropped blocks."""

    engine: Engine
    context: Context
    dropped: float = 0.0


@dataclass(frozen=True)
class DecodeCost:
    """Cost of a decode step: wall-clock seconds, and this rank's CPU seconds, bytes sent and messages sent.

    The CPU seconds are the sum over all threads of the rank.
    """

    seconds: float
    cpu_seconds: float
    bytes_sent: int
    messages: int


@dataclass(frozen=True)
class BatchTimes:
    """Cost of a decode step for one batch size, by variant: times of every round, bytes and messages of the last.

    All figures are this rank's; only rank 0 has figures of the variant `ONE_RANK`.  A collective over N ranks counts as
    N - 1 messages.
    """

    batch: int
    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    bytes_sent: dict[str, int]
    messages: dict[str, int]


def prepare(config: DictConfig) -> DecodeJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, DecodeSettings)
    refuse_unwritable(settings.out)
    target = resolve_target(config, "recipes.bench decode", unused_axes=("tp", "dp", "pp"), spd="refuse")
    if settings.dropped:
        if target.mesh.context == 1:
            raise ValueError("dropped: one rank has no reduction to drop; use mesh.ring=2 or more, or dropped=[]")
        refuse_unfit_shape(target.shape)
        blocks = [len(plan_for(share, target).dropped) for share in settings.dropped]
        if 0 in blocks or len({*blocks}) < len(blocks):
            raise ValueError(
                f"dropped={list(settings.dropped)} are {blocks} of {target.shape.layers} blocks: give shares of "
                f"different numbers of blocks, from {least_budget(target.shape.layers):g}"
            )
    refuse_links(settings.hosts, settings.rate, settings.latency_us, target.mesh)
    return DecodeJob(settings, target)


def run_rank(rank: Rank, job: DecodeJob) -> list[BatchTimes]:
    """Time every batch size, as one of the ranks; the first rank's times are reported."""
    from longctx.infer.engine import load_alone

    settings, target = job.settings, job.target
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = target.load_engine(runtime, plan_for(0, target) if settings.dropped else None)
        alone = load_alone(runtime, engine, target.model, target.folder)
        variants: dict[str, Variant] = {name: Variant(engine, Context(decode=name)) for name in settings.strategies}
        for share in settings.dropped:
            dropped = len(plan_for(share, target).dropped) / target.shape.layers
            variants[f"sharded, {100 * dropped:.3g}% dropped"] = Variant(engine, Context(decode="sharded"), share)
        variants[ONE_RANK] = Variant(alone, Context())
        times = []
        for batch in settings.batch:
            progress.start(f"batch of {batch}, runs", len(variants) * (settings.rounds + 1))
            times.append(time_batch(runtime, variants, job, batch, progress.step))
    return times


def plan_for(share: float, target: Target) -> SPDPlan:
    """Return the plan by which the model's first blocks, ``share`` of all, drop a reduction over context ranks."""
    layers = target.shape.layers
    return SPDPlan(layers, target.mesh.context, within(range(layers), share))


def time_batch(
    runtime: Runtime,
    variants: Mapping[str, Variant],
    job: DecodeJob,
    batch: int,
    done: Callable[[], None],
) -> BatchTimes:
    """Time decode steps of ``batch`` sequences by each of ``variants``.

    `ONE_RANK` runs on rank 0 while the other ranks wait.  ``done`` is called after each measurement.
    """
    from longctx.megatron.spd.layer import follow_plan

    settings = job.settings
    sessions = {name: start_session(each.engine, each.context, settings, batch) for name, each in variants.items()}

    def measure(variant: str) -> DecodeCost | None:
        barrier(runtime.context)
        if variant == ONE_RANK and runtime.rank.rank:
            return None
        if settings.dropped:
            follow_plan(variants[variant].engine.model, plan_for(variants[variant].dropped, job.target))
        return decode_steps(sessions[variant], settings.tokens, batch)

    rounds = measure_in_rounds(list(sessions), settings.rounds, measure, done)
    costs = {name: [cost for cost in each.timed if cost] for name, each in zip(sessions, rounds, strict=True)}
    return BatchTimes(
        batch=batch,
        seconds={name: [cost.seconds for cost in each] for name, each in costs.items()},
        cpu_seconds={name: [cost.cpu_seconds for cost in each] for name, each in costs.items()},
        bytes_sent={name: each[-1].bytes_sent for name, each in costs.items() if each},
        messages={name: each[-1].messages for name, each in costs.items() if each},
    )


def start_session(engine: Engine, context: Context, settings: DecodeSettings, batch: int) -> Session:
    """Return a session of ``batch`` sequences whose caches hold random rows, with room for all tokens to decode."""
    from longctx.infer.session import Session
    from longctx.infer.turn import Conversation

    session = Session(engine, context, Sampling())
    reserve = settings.cached + (settings.rounds + 1) * settings.tokens
    for i in range(batch):
        session.sequences[i] = Conversation(
            make_random_cache(engine, settings.cached, reserve), [0] * settings.cached + [1]
        )
    return session


def decode_steps(session: Session, tokens: int, batch: int) -> DecodeCost:
    """Decode ``tokens`` tokens of each sequence and return the cost per step."""
    engine = session.engine
    sent, messages, cpu_began = engine.sent, count_messages(engine), time.process_time()

    def decode() -> None:
        for _ in range(tokens):
            session.decode(range(batch))

    seconds = measure_seconds(decode)
    cpu_seconds = time.process_time() - cpu_began
    sent, messages = engine.sent - sent, count_messages(engine) - messages
    return DecodeCost(seconds / tokens, cpu_seconds / tokens, sent // tokens, messages // tokens)


def count_messages(engine: Engine) -> int:
    """Return how many messages this rank has sent so far to other context ranks.

    In sharded decoding, messages that sum partial outputs over tensor-parallel and context ranks count, too.
    """
    comms = [engine.context, engine.ring, engine.ulysses] + ([engine.share.tp_context] if engine.share else [])
    return sum(sum(comm.traffic.messages.values()) for comm in {id(comm): comm for comm in comms}.values())


def show(times: list[BatchTimes]) -> None:
    """Print milliseconds, bytes and messages per step as a table."""
    table = Table(box=None)
    times_of_rank = ("TTIT ms", "of one rank's", "CPU ms, rank 0", "of one rank's")
    for column in ("batch", "strategy", *times_of_rank, "sent, rank 0", "messages"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for of_batch in times:
        for variant, sent in of_batch.bytes_sent.items():
            row = [str(of_batch.batch), variant]
            for by_variant in (of_batch.seconds, of_batch.cpu_seconds):
                seconds, one_rank = median(by_variant[variant]), median(by_variant[ONE_RANK])
                row += [f"{seconds * 1e3:.1f}", f"{seconds / one_rank:.2f}"]
            table.add_row(*row, f"{sent:,} B", f"{of_batch.messages[variant]:,}")
    console.print(table)


def task(config: DictConfig) -> None:
    """Run the ranks, show and write rank 0's times; with ``hosts``, run this command on an emulated host per rank."""
    if not config.hosts:
        warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    job = prepare(config)
    settings = job.settings
    if settings.hosts and not is_host():
        run_on_hosts(settings.hosts, settings.rate, [sys.executable, *sys.orig_argv[1:]], settings.latency_us)
        return
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is None:
        return
    show(times)
    if settings.out:
        links = {"rate": settings.rate, "latency_us": settings.latency_us} if settings.hosts else {}
        inputs = {"model": job.target.model.name, "mesh": str(job.target.mesh), "cached": settings.cached, **links}
        write_result(settings.out, {**provenance(), **inputs, "rows": [asdict(of_batch) for of_batch in times]})
