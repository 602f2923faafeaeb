"""Time to incremental token (TTIT) over a sharded cache: each decode strategy and one rank, side by side in one run.

python -m recipes.bench decode
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import Context, Sampling
from longctx.parallel.launch import Rank
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
    """Settings of configs/bench/decode.yaml outside any section."""

    cached: PositiveInt = 4096
    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    tokens: PositiveInt = 8
    rounds: PositiveInt = 3
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = STRATEGIES
    out: str | None = None


@dataclass(frozen=True)
class DecodeJob:
    """The inputs of every rank."""

    settings: DecodeSettings
    target: Target


@dataclass(frozen=True)
class DecodeCost:
    """Cost of a decode step: seconds, this rank's CPU seconds (all threads), and the bytes that this rank sent."""

    seconds: float
    cpu_seconds: float
    bytes_sent: int


@dataclass(frozen=True)
class BatchTimes:
    """Figures of a decode step for one batch size, by variant: times of every round, bytes of the last round."""

    batch: int
    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    bytes_sent: dict[str, int]


def prepare(config: DictConfig) -> DecodeJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, DecodeSettings)
    refuse_unwritable(settings.out)
    return DecodeJob(
        settings, resolve_target(config, "recipes.bench decode", unused_axes=("tp", "dp", "pp"), spd="refuse")
    )


def run_rank(rank: Rank, job: DecodeJob) -> list[BatchTimes]:
    """Time every batch size on one rank; the first rank's times are reported."""
    from longctx.infer.engine import load_alone

    settings, target = job.settings, job.target
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = target.load_engine(runtime)
        alone = load_alone(runtime, engine, target.model, target.folder)
        variants = {name: (engine, Context(decode=name)) for name in settings.strategies} | {
            ONE_RANK: (alone, Context())
        }
        times = []
        for batch in settings.batch:
            progress.start(f"batch of {batch}, runs", len(variants) * (settings.rounds + 1))
            times.append(time_batch(runtime, variants, settings, batch, progress.step))
    return times


def time_batch(
    runtime: Runtime,
    variants: Mapping[str, tuple[Engine, Context]],
    settings: DecodeSettings,
    batch: int,
    done: Callable[[], None],
) -> BatchTimes:
    """Time decode steps of ``batch`` sequences by each variant; `ONE_RANK` runs on rank 0 while the others wait."""
    sessions = {name: start_session(*variant, settings, batch) for name, variant in variants.items()}

    def measure(variant: str) -> DecodeCost | None:
        barrier(runtime.context)
        if variant == ONE_RANK and runtime.rank.rank:
            return None
        return decode_steps(sessions[variant], settings.tokens, batch)

    rounds = measure_in_rounds(list(sessions), settings.rounds, measure, done)
    costs = {name: [cost for cost in each.timed if cost] for name, each in zip(sessions, rounds, strict=True)}
    return BatchTimes(
        batch=batch,
        seconds={name: [cost.seconds for cost in each] for name, each in costs.items()},
        cpu_seconds={name: [cost.cpu_seconds for cost in each] for name, each in costs.items()},
        bytes_sent={name: each[-1].bytes_sent for name, each in costs.items() if each},
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
    sent, cpu_began = session.engine.sent, time.process_time()

    def decode() -> None:
        for _ in range(tokens):
            session.decode(range(batch))

    seconds = measure_seconds(decode)
    cpu_seconds = time.process_time() - cpu_began
    return DecodeCost(seconds / tokens, cpu_seconds / tokens, (session.engine.sent - sent) // tokens)


def show(times: list[BatchTimes]) -> None:
    """Print milliseconds and bytes per step as a table."""
    table = Table(box=None)
    for column in ("batch", "strategy", "TTIT ms", "of one rank's", "CPU ms, rank 0", "of one rank's", "sent, rank 0"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for of_batch in times:
        for variant, sent in of_batch.bytes_sent.items():
            row = [str(of_batch.batch), variant]
            for by_variant in (of_batch.seconds, of_batch.cpu_seconds):
                seconds, one_rank = median(by_variant[variant]), median(by_variant[ONE_RANK])
                row += [f"{seconds * 1e3:.1f}", f"{seconds / one_rank:.2f}"]
            table.add_row(*row, f"{sent:,} B")
    console.print(table)


def task(config: DictConfig) -> None:
    """Run the ranks, then show and write the first rank's times."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    job = prepare(config)
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is None:
        return
    show(times)
    if job.settings.out:
        inputs = {"model": job.target.model.name, "mesh": str(job.target.mesh), "cached": job.settings.cached}
        write_result(job.settings.out, {**provenance(), **inputs, "rows": [asdict(of_batch) for of_batch in times]})
