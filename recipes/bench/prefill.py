"""What sharding costs: the same work on one rank and on two, side by side in one run.

    python -m recipes.bench prefill

Efficiency is t(one rank) / (N * t(N ranks)), one thread a rank.  Three shares multiply to it and say where the
rest goes: the machine (N busy ranks slow each other down, with nothing to do with us), the blocks (the ring's
tiles are smaller than one large call, and are merged), and communication.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import Mesh, ModelSource, PromptSource
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, CompletedPending, Pending, Shape, Traffic
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unused
from longctx.shapes import Tensor
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.spd_plan import refuse_adapted

Work = Callable[[], None]


@dataclass(frozen=True)
class PrefillSettings:
    """The settings of configs/bench_prefill.yaml that are not a section of their own."""

    parts: tuple[Literal["attention", "model"], ...]
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    rounds: PositiveInt
    layers: PositiveInt | None
    out: str | None


@dataclass(frozen=True)
class PrefillJob:
    """What every rank needs to know."""

    settings: PrefillSettings
    mesh: Mesh
    model: ModelSource
    folder: Path
    shape: ModelShape
    tokens: tuple[int, ...]


@dataclass
class NullComm:
    """A ring whose neighbours' tensors are there at once: what remains is the price of computing in blocks."""

    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)
    _there: dict[Shape, Tensor] = field(default_factory=dict)

    def shift(self, *mine: Tensor, shapes: Sequence[Shape]) -> Pending:
        """Tensors of the right shapes; the values do not change how long it takes."""
        return CompletedPending(
            tuple(self._there.setdefault(tuple(s), x.new_zeros(s)) for x, s in zip(mine, shapes, strict=True))
        )

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Not timed in silence: pass-KV exchanges nothing but shifts."""
        raise AssertionError((parts, shapes))

    def all_gather(self, mine: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Not timed in silence: pass-KV exchanges nothing but shifts."""
        raise AssertionError((mine, shapes))


def attention_variants(job: PrefillJob, length: int, here: Any) -> dict[str, Work]:
    """Causal attention of one layer of the model: by one kernel call, by the ring, by the silent ring."""
    from longctx.attention.backends import kernel_for
    from longctx.attention.layout import zigzag
    from longctx.parallel.ring import Ring, pass_kv

    kernel, shape = kernel_for("auto", here.device.type, job.model.dtype), job.shape
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    kind = getattr(torch, job.model.dtype)
    whole = [torch.randn(1, length, n, shape.head_dim, dtype=kind, device=here.device) for n in heads]
    layout = zigzag(length, here.ring.size)
    q, k, v = (layout.shard(x, here.ring.rank, 1) for x in whole)

    def around(comm: Comm) -> Work:
        return lambda: _done(pass_kv(q, k, v, Ring(comm, layout, layout), kernel))

    return {
        "one": lambda: _done(kernel.forward(whole[0], whole[1], whole[2], True)),
        "ring": around(here.ring),
        "silent": around(NullComm(here.ring.rank, here.ring.size)),
    }


def model_variants(job: PrefillJob, length: int, here: Any) -> dict[str, Work]:
    """Prefill of the whole model: by one rank, by the ring, by the silent ring."""
    from longctx.attention.layout import contiguous, zigzag
    from longctx.infer.engine import Engine, load_alone, load_engine
    from longctx.infer.prefill import run_pass
    from longctx.parallel.ring import pass_kv

    if job.settings.layers:
        engine = with_few_layers(here, job, job.settings.layers)
    else:
        engine = load_engine(here, job.model, job.shape, job.folder, "auto")
    alone = load_alone(here, engine, job.model, job.folder)
    silent = replace(engine, ring=NullComm(here.ring.rank, here.ring.size))
    tokens = torch.tensor(job.tokens[:length])

    def prefill(on: Engine) -> Work:
        layout = zigzag(length, on.ring.size) if on.ring.size > 1 else contiguous(length, 1)
        return lambda: _done(run_pass(on, tokens, layout, on.cache(length), on.everywhere(pass_kv)))

    return {"one": prefill(alone), "ring": prefill(engine), "silent": prefill(silent)}


def with_few_layers(here: Any, job: PrefillJob, layers: int) -> Any:
    """The model with its first ``layers`` only, which take as long as any others, and random weights."""
    from longctx.attention.backends import kernel_for
    from longctx.infer.engine import Engine
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import build_model

    shape = replace(job.shape, layers=layers, windows=job.shape.windows[:layers])
    dtype = getattr(torch, job.model.dtype)
    net = build_model(shape, here.groups, dtype=dtype, layers="local", device=here.device)
    hf_load.load(net, RandomInit(shape, seed=0), shape)
    comms = (here.tp, here.ulysses, here.ring, here.context)
    return Engine(net, shape, kernel_for("auto", here.device.type, job.model.dtype), *comms)


def _done(_: object) -> None:
    """The result is not looked at here: tests do that."""


def seconds(work: Work, here: Any, *, by_all: bool) -> float:
    """Wall seconds of ``work`` on every rank (the slowest counts), or on the first while the others wait."""
    here.context.all_gather(torch.zeros(1), [(1,)] * here.context.size)  # wait for the others
    began = time.perf_counter()
    if by_all or here.context.rank == 0:
        work()
    took = torch.tensor([time.perf_counter() - began])
    return float(torch.cat(here.context.all_gather(took, [(1,)] * here.context.size)).max())


def run_rank(rank: Rank, job: PrefillJob) -> list[dict[str, Any]]:
    """Every part at every length, each way's seconds by round."""
    from longctx.megatron.runtime import runtime

    measured = []
    with (
        runtime(rank, job.mesh, threads=1) as here,
        Progress(shown=rank.rank == 0) as progress,
        torch.inference_mode(),
    ):
        for part in job.settings.parts:
            for length in job.settings.lengths:
                make = attention_variants if part == "attention" else model_variants
                ways = make(job, length, here)
                progress.start(f"{part}, {length:,} tokens, runs", 4 * (job.settings.rounds + 1))
                times = timed(ways, job.settings.rounds, here, progress.step)
                measured.append(figures(part, length, job.mesh.ring, times))
    return measured


def timed(ways: dict[str, Work], rounds: int, here: Any, done: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of ``ways`` by round, in turn within each so that all see the same machine.

    A first round warms up, and is left out.
    """
    times: dict[str, list[float]] = {"one": [], "all at once": [], "silent": [], "ring": []}
    for warm in [False] + [True] * rounds:
        for name, taken in times.items():
            way = ways["one" if name == "all at once" else name]
            took = seconds(way, here, by_all=name != "one")
            if warm:
                taken.append(took)
            done()
    return times


def figures(part: str, length: int, ranks: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Efficiency and its three shares, from the fastest of each way's times: only other work makes a run slower."""
    took = {name: min(taken) for name, taken in times.items()}
    return {
        "part": part,
        "tokens": length,
        "ranks": ranks,
        "rounds": len(times["one"]),
        "efficiency": took["one"] / (ranks * took["ring"]),
        "machine": took["one"] / took["all at once"],
        "blocks": took["all at once"] / (ranks * took["silent"]),
        "communication": took["silent"] / took["ring"],
        "seconds": times,
    }


def show(measured: list[dict[str, Any]]) -> None:
    """The efficiencies as a table."""
    table = Table(box=None)
    for column in ("part", "tokens", "efficiency", "= machine", "x blocks", "x communication"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in measured:
        shares = [f"{row[name]:.3f}" for name in ("efficiency", "machine", "blocks", "communication")]
        table.add_row(row["part"], f"{row['tokens']:,}", *shares)
    console.print(table)


def task(config: DictConfig) -> None:
    """Measure; write and show what the first rank gives."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.prefill", "recipes.common.progress"])
    settings, mesh = top_level(config, PrefillSettings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.bench", ("tp", "ulysses", "dp", "pp"))
    if mesh.ring < 2:
        raise ValueError(f"mesh.ring={mesh.ring} shares nothing: use mesh.ring=2 or more")
    refuse_unwritable(settings.out)
    folder = locate(model, say)
    refuse_adapted(folder, "recipes.bench prefill")
    longest = PromptSource(pydoc="all", tokens=max(settings.lengths))
    tokens, available = prompt_tokens(longest, tokenizer_of(folder))
    if available < max(settings.lengths):
        raise ValueError(f"lengths={max(settings.lengths)}: the text has {available:,} tokens; use at most that")
    shape = shape_of(folder)
    if settings.layers and settings.layers > shape.layers:
        raise ValueError(f"layers={settings.layers}: the model has {shape.layers}; use at most that, or null for all")
    job = PrefillJob(settings, mesh, model, folder, shape, tuple(tokens))
    measured = on_ranks(mesh, run_rank, job)
    if measured is None:
        return
    show(measured)
    if settings.out:
        write_result(settings.out, {**provenance(), "layers": settings.layers or shape.layers, "measured": measured})
