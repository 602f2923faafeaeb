"""Parallel efficiency of prefill: the same work on one rank and on N, side by side in one run.

    python -m recipes.bench prefill

Efficiency is t(one rank) / (N * t(N ranks)), with one thread per rank.  It is the product of three factors:

* machine: t(one rank alone) / t(one rank's work on N busy ranks).  Busy cores slow each other down.
* blocks: the ring computes smaller tiles than one large kernel call, and merges them.
* communication: the time that the ring's transfers add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.parallel.comm import Comm, CompletedPending, Pending, Shape, Traffic
from longctx.parallel.launch import Rank
from longctx.shapes import AnyShape
from recipes.bench.timing import measure_in_rounds, read_tokens, time_on_ranks
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.megatron.runtime import Runtime
    from longctx.spd.plan import SPDPlan

Work = Callable[[], object]
Part = Literal["attention", "model"]
# The timed variants in their order: one rank alone, its work on all ranks at once, a ring without transfers, the ring.
VARIANTS = ("one", "all at once", "silent", "ring")


@dataclass(frozen=True)
class PrefillSettings:
    """Top-level settings of configs/bench/prefill.yaml."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("attention", "model")
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8192, 16384)
    rounds: PositiveInt = 3
    layers: PositiveInt | None = None
    out: str | None = None


@dataclass(frozen=True)
class PrefillJob:
    """The inputs of every rank; ``tokens`` is the longest prompt."""

    settings: PrefillSettings
    target: Target
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Efficiency:
    """Efficiency of one part of the work at one length; ``seconds`` by variant and round.

    ``efficiency`` is the product of ``machine``, ``blocks`` and ``communication``, which the top of this file explains.
    """

    part: str
    tokens: int
    ranks: int
    rounds: int
    efficiency: float
    machine: float
    blocks: float
    communication: float
    seconds: dict[str, list[float]]


@dataclass
class NullComm:
    """A ring of ``size`` ranks without transfers: `shift` returns at once, with zeros of the expected shapes.

    Attention over it has the cost of computing in blocks, but not that of communication.  ``traffic`` stays 0.  Only
    `shift` works.
    """

    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)
    _received: dict[Shape, AnyShape] = field(default_factory=dict)

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Pending:
        """Return a completed `Pending` of zeros of ``shapes``; the values do not change how long attention takes."""
        return CompletedPending(
            tuple(self._received.setdefault(tuple(s), x.new_zeros(s)) for x, s in zip(mine, shapes, strict=True))
        )

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        """Raise AssertionError: pass-KV communicates by `shift` alone."""
        raise AssertionError((parts, shapes, small))

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        """Raise AssertionError: pass-KV communicates by `shift` alone."""
        raise AssertionError((mine, shapes))


def prepare(config: DictConfig) -> PrefillJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, PrefillSettings)
    refuse_unwritable(settings.out)
    target = resolve_target(
        config,
        "recipes.bench prefill",
        unused_axes=("tp", "ulysses", "dp", "pp"),
        needs_weights="model" in settings.parts and not settings.layers,
        spd="refuse",
    )
    if target.mesh.ring < 2:
        raise ValueError(f"mesh.ring={target.mesh.ring} shards nothing: use mesh.ring=2 or more")
    layers = target.shape.layers
    if settings.layers and settings.layers > layers:
        raise ValueError(f"layers={settings.layers}: the model has {layers}; use at most that, or null for all")
    return PrefillJob(settings, target, read_tokens(target, "lengths", max(settings.lengths)))


def run_rank(rank: Rank, job: PrefillJob) -> list[Efficiency]:
    """Time every part of the work at every length; all ranks return the same figures."""
    settings, figures = job.settings, []
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress, torch.inference_mode():
        for part in settings.parts:
            for length in settings.lengths:
                works = (attention_works if part == "attention" else model_works)(job, length, runtime)
                progress.start(f"{part}, {length:,} tokens, runs", len(VARIANTS) * (settings.rounds + 1))
                times = time_variants(works, settings.rounds, runtime.context, progress.step)
                figures.append(compute_efficiency(part, length, job.target.mesh.ring, times))
    return figures


def attention_works(job: PrefillJob, length: int, runtime: Runtime) -> dict[str, Work]:
    """Return functions that run one layer's causal attention over ``length`` tokens, by name.

    "one" is one kernel call, "ring" is pass-KV over the ring, and "silent" is pass-KV without transfers.
    """
    from longctx.attention.backends import kernel_for
    from longctx.attention.layout import zigzag
    from longctx.parallel.ring import Ring, pass_kv

    shape, model, ring = job.target.shape, job.target.model, runtime.ring
    kernel = kernel_for("auto", runtime.device.type, model.dtype)
    whole_q, whole_k, whole_v = (
        torch.randn(1, length, heads, shape.head_dim, dtype=getattr(torch, model.dtype), device=runtime.device)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    layout = zigzag(length, ring.size)
    q, k, v = (layout.shard(x, ring.rank, 1) for x in (whole_q, whole_k, whole_v))

    def attend_on(comm: Comm) -> Work:
        return lambda: pass_kv(q, k, v, Ring(comm, layout, layout), kernel)

    return {
        "one": lambda: kernel.forward(whole_q, whole_k, whole_v, True),
        "ring": attend_on(ring),
        "silent": attend_on(NullComm(ring.rank, ring.size)),
    }


def model_works(job: PrefillJob, length: int, runtime: Runtime) -> dict[str, Work]:
    """Return functions that prefill ``length`` tokens, by name.

    "one" runs on this rank alone, "ring" by pass-KV over the ring, and "silent" like "ring" without transfers.  They
    run the whole model; with the setting ``layers``, they run only its first layers, with random weights.
    """
    from longctx.attention.layout import contiguous, zigzag
    from longctx.infer.engine import load_alone
    from longctx.infer.prefill import run_pass
    from longctx.parallel.ring import pass_kv

    target, layers = job.target, job.settings.layers
    engine = build_shallow_engine(runtime, target, layers) if layers else target.load_engine(runtime)
    alone = load_alone(runtime, engine, target.model, target.folder)
    silent = replace(engine, ring=NullComm(runtime.ring.rank, runtime.ring.size))
    tokens = torch.tensor(job.tokens[:length])

    def prefill_on(engine: Engine) -> Work:
        layout = zigzag(length, engine.ring.size) if engine.ring.size > 1 else contiguous(length, 1)
        return lambda: run_pass(engine, tokens, layout, engine.cache(length), engine.everywhere(pass_kv))

    return {"one": prefill_on(alone), "ring": prefill_on(engine), "silent": prefill_on(silent)}


def build_shallow_engine(runtime: Runtime, target: Target, layers: int, plan: SPDPlan | None = None) -> Engine:
    """Return an engine with the first ``layers`` layers of the model and random weights.

    All layers take the same time, so a few are enough.  ``plan`` has the blocks that drop a reduction (None: none).
    The engine has no weight share, which sharded decoding needs.
    """
    from longctx.attention.backends import kernel_for
    from longctx.infer.engine import Engine
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import build_model

    shape = target.shape.first(layers)
    dtype = getattr(torch, target.model.dtype)
    net = build_model(shape, runtime.groups, dtype=dtype, layers="local", device=runtime.device, plan=plan)
    hf_load.load(net, RandomInit(shape, seed=0), shape)
    comms = (runtime.tp, runtime.ulysses, runtime.ring, runtime.context)
    return Engine(net, shape, kernel_for(target.context.kernel, runtime.device.type, target.model.dtype), *comms)


def time_variants(
    works: Mapping[str, Work], rounds: int, group: Comm, done: Callable[[], None]
) -> dict[str, list[float]]:
    """Return, for each of `VARIANTS`, the seconds of the slowest rank of ``group`` by round, without the warm-up.

    "one" is timed on the first rank alone; "all at once" is the same work on every rank.  ``done`` is called after each
    measurement, also in the warm-up round.  Every rank of ``group`` calls this.
    """

    def measure(variant: str) -> float:
        work = works["one" if variant == "all at once" else variant]
        return time_on_ranks(group, work, only_first=variant == "one")

    times = measure_in_rounds(VARIANTS, rounds, measure, done)
    return {variant: of_variant.timed for variant, of_variant in zip(VARIANTS, times, strict=True)}


def compute_efficiency(part: str, length: int, ranks: int, times: dict[str, list[float]]) -> Efficiency:
    """Return the efficiency and its factors from each variant's fastest round: other work only makes a round slower."""
    fastest = {variant: min(seconds) for variant, seconds in times.items()}
    return Efficiency(
        part=part,
        tokens=length,
        ranks=ranks,
        rounds=len(times["one"]),
        efficiency=fastest["one"] / (ranks * fastest["ring"]),
        machine=fastest["one"] / fastest["all at once"],
        blocks=fastest["all at once"] / (ranks * fastest["silent"]),
        communication=fastest["silent"] / fastest["ring"],
        seconds=times,
    )


def show(figures: list[Efficiency]) -> None:
    """Print the efficiencies and their factors as a table."""
    table = Table(box=None)
    for column in ("part", "tokens", "efficiency", "= machine", "x blocks", "x communication"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for each in figures:
        factors = (each.efficiency, each.machine, each.blocks, each.communication)
        table.add_row(each.part, f"{each.tokens:,}", *(f"{factor:.3f}" for factor in factors))
    console.print(table)


def task(config: DictConfig) -> None:
    """Run the ranks and show the efficiencies; also write them if ``out`` is set."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.prefill", "recipes.common.progress"])
    job = prepare(config)
    figures = on_ranks(job.target.mesh, run_rank, job)
    if figures is None:
        return
    show(figures)
    if job.settings.out:
        layers = job.settings.layers or job.target.shape.layers
        measured = [asdict(each) for each in figures]
        write_result(job.settings.out, {**provenance(), "layers": layers, "measured": measured})
