"""A server's load: many clients at once, against one request at a time; with and without shared prefixes and chunking.

python -m recipes.bench serve
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated, Literal

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Sampling
from longctx.parallel.launch import Rank
from recipes.bench.serve_load import LoadFigures, make_load, play_clients
from recipes.bench.timing import read_tokens, refuse_beyond_model
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.decode_choice import make_decode_chooser
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.continuous import ContinuousSession
    from longctx.megatron.runtime import Runtime
    from longctx.serve.schedule import Limits, NewSequence

ALONE = "one at a time"
Variant = Literal["sharing", "no sharing", "no chunking"]
VARIANTS: tuple[Variant, ...] = ("sharing", "no sharing", "no chunking")


@dataclass(frozen=True)
class ServeBenchSettings:
    """Top-level settings of configs/bench/serve.yaml."""

    requests: PositiveInt = 200
    clients: PositiveInt = 16
    min_length: PositiveInt = 20
    max_length: PositiveInt = 4000
    short: PositiveInt = 512
    prefixes: PositiveInt = 8
    new_tokens: PositiveInt = 16
    gb: NonNegativeFloat = 1.0
    page: PositiveInt = 64
    one_rank_tokens: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = VARIANTS
    out: str | None = None

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is over max_length={self.max_length}: use at most that")


@dataclass(frozen=True)
class ServeBenchJob:
    """The inputs of every rank; ``text`` has the tokens that the prompts are cut from."""

    settings: ServeBenchSettings
    target: Target
    text: tuple[int, ...]


def prepare(config: DictConfig) -> ServeBenchJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, ServeBenchSettings)
    refuse_unwritable(settings.out)
    target = resolve_target(
        config, "recipes.bench serve", unused_axes=("tp", "dp", "pp"), decode_by_batch=True, spd="refuse"
    )
    refuse_beyond_model(target, max_length=settings.max_length, new_tokens=settings.new_tokens)
    return ServeBenchJob(settings, target, read_tokens(target, "max_length", settings.max_length))


def run_rank(rank: Rank, job: ServeBenchJob) -> list[LoadFigures]:
    """Answer the load one request at a time, then by every variant; return the figures of each, in this order.

    Before them, the first request is answered once, without figures: the first calls of a process take longer.  Rank 0
    plays the clients.  The other ranks follow it, and their figures are empty.
    """
    from longctx.infer.continuous import ContinuousSession

    settings, target = job.settings, job.target
    load = make_load(settings, job.text)
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        engine = target.load_engine(runtime)
        choose_decode = make_decode_chooser(runtime, target, engine)
        new_session = partial(ContinuousSession, engine, target.context, Sampling(), choose_decode=choose_decode)
        run_variant(new_session, runtime, job, ALONE, load[:1], lambda: None)
        figures = []
        for variant in (ALONE, *settings.variants):
            progress.start(variant, len(load))
            figures.append(run_variant(new_session, runtime, job, variant, load, progress.step))
        add_margins(new_session, runtime, job, load, figures)
        return figures


def add_margins(
    new_session: Callable[[], ContinuousSession],
    runtime: Runtime,
    job: ServeBenchJob,
    load: Sequence[NewSequence],
    figures: Sequence[LoadFigures],
) -> None:
    """Fill in `LoadFigures.margins` of all ``figures`` but the first, which are those of one request at a time.

    Each request that another variant answered differently is answered once more, alone, with log-probabilities.  All
    ranks call this; rank 0 alone has figures.  A margin near 0 means that rounding decides between two tokens.
    """
    alone, *others = figures
    numbers = {number for one in others for number in one.other_than(alone)}
    again = [replace(one, sampling=Sampling(logprobs=2)) for one in load if one.number in numbers]
    top = run_variant(new_session, runtime, job, ALONE, again, lambda: None).top
    for one in others:
        for number, equal in one.other_than(alone).items():
            (_, first), (_, second) = top[number][equal]
            one.margins[number] = first - second


def limits_of(job: ServeBenchJob, variant: str) -> Limits:
    """Return the limits of the server in ``variant``."""
    from longctx.serve.schedule import Limits

    settings, most = job.settings, job.settings.max_length + job.settings.new_tokens
    whole = settings.clients * most
    chunk = whole if variant == "no chunking" else job.target.context.chunk or whole
    page_bytes = 0 if variant in (ALONE, "no sharing") else int(settings.gb * 1e9)
    return Limits(chunk, settings.clients, whole, page_bytes, settings.page)


def run_variant(
    new_session: Callable[[], ContinuousSession],
    runtime: Runtime,
    job: ServeBenchJob,
    variant: str,
    load: Sequence[NewSequence],
    done: Callable[[], None],
) -> LoadFigures:
    """Answer the requests of ``load`` as ``variant`` says, and return the figures; all ranks call this.

    Rank 0 plays the clients, and calls ``done`` after each answer.  The other ranks return empty figures.
    """
    from longctx.hf.config import tokenizer_of
    from longctx.serve.one_rank import OneRank
    from longctx.serve.ranks import follow
    from longctx.serve.service import Service

    session, figures = new_session(), LoadFigures(variant)
    one_rank = OneRank(job.settings.one_rank_tokens, job.target.threads(runtime.rank) * job.target.mesh.ring)
    if runtime.rank.rank:
        follow(session, runtime.world, one_rank=one_rank)
        return figures
    service = Service(session, runtime.world, tokenizer_of(job.target.folder), limits_of(job, variant), None, one_rank)
    play_clients(service, load, 1 if variant == ALONE else job.settings.clients, figures, done)
    service.stop()
    figures.hit_rate, figures.evicted = service.prefixes.hit_rate, service.prefixes.evicted
    figures.page_bytes = service.page_bytes
    return figures


def summarise(job: ServeBenchJob, all_figures: Sequence[LoadFigures]) -> list[dict[str, object]]:
    """Return a row of figures for each variant, with its speed and equal answers compared with the first variant.

    The first variant answered one request at a time.  Requests that failed do not count in the rates; "speedup" is
    None if all failed in the first variant.
    """
    load, alone = make_load(job.settings, job.text), all_figures[0]
    alone_per_s = len(alone.answers) / alone.seconds
    short = {one.number for one in load if len(one.prompt) < job.settings.short}
    table_rows: list[dict[str, object]] = []
    for figures in all_figures:
        per_s = len(figures.answers) / figures.seconds
        p50, p95 = middle_and_tail([seconds for number, seconds in figures.first_token_s.items() if number in short])
        table_rows.append(
            {
                "variant": figures.variant,
                "seconds": figures.seconds,
                "requests_per_s": per_s,
                "speedup": per_s / alone_per_s if alone_per_s else None,
                "short_ttft_p50_s": p50,
                "short_ttft_p95_s": p95,
                "ttft_p50_s": middle_and_tail([*figures.first_token_s.values()])[0],
                "equal_answers": figures.count_equal(alone),
                "margins_of_others": figures.margins,
                "failures": figures.failures,
                "hit_rate": figures.hit_rate,
                "evicted_pages": figures.evicted,
                "page_bytes_by_rank": figures.page_bytes,
            }
        )
    return table_rows


def middle_and_tail(seconds: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the median and the 95th percentile; None for none."""
    if not seconds:
        return None, None
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    return median(seconds), quantiles(seconds, n=20, method="inclusive")[-1]


def show(table_rows: Sequence[dict[str, object]], requests: int) -> None:
    """Print the figures of each variant, a row of ``table_rows``, as a table; the load had ``requests`` requests."""
    table = Table(box=None)
    for column in ("variant", "s", "speedup", "short TTFT p50", "p95", "equal answers", "hit rate", "MB by rank"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for one in table_rows:
        megabytes = " ".join(f"{size / 1e6:.0f}" for size in one["page_bytes_by_rank"])  # type: ignore[attr-defined]
        figures = [f"{one['seconds']:.1f}", "" if one["speedup"] is None else f"{one['speedup']:.2f}"]
        short = [one[name] for name in ("short_ttft_p50_s", "short_ttft_p95_s")]
        figures += ["" if seconds is None else f"{seconds:.2f}" for seconds in short]
        figures += [f"{one['equal_answers']} of {requests}", f"{one['hit_rate']:.2f}", megabytes]
        table.add_row(str(one["variant"]), *figures)
    console.print(table)
    for one in table_rows:
        if failures := one["failures"]:
            console.print(f"{one['variant']}: {len(failures)} of {requests} requests failed: {failures[0]}")  # type: ignore[arg-type, index]
        for number, margin in one["margins_of_others"].items():  # type: ignore[attr-defined]
            console.print(
                f"{one['variant']}: request {number} parts from its answer alone at a margin of {margin:.1e} nats"
            )


def task(config: DictConfig) -> None:
    """Run the ranks and show the figures; also write them if ``out`` is set.  Exit with code 1 if a request failed."""
    warm_up_ranks(["longctx.infer.engine", "longctx.serve.service", "recipes.common.progress"])
    job = prepare(config)
    figures = on_ranks(job.target.mesh, run_rank, job)
    if figures is None:
        return
    table_rows = summarise(job, figures)
    show(table_rows, job.settings.requests)
    if job.settings.out:
        target = job.target
        inputs = {"model": target.model.name, "mesh": str(target.mesh), "context": asdict(target.context)}
        inputs |= {"settings": asdict(job.settings)}
        write_result(job.settings.out, {**provenance(), **inputs, "rows": table_rows})
    if any(one.failures for one in figures):
        sys.exit(1)
