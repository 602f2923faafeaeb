"""Do more ranks add error to a real model's attention in bfloat16?  Layer by layer, against float64.

    python -m recipes.bench drift out=drift.json picture=drift.svg

The model reads real text once, on one rank; what each layer hands its attention is kept: queries and keys (after
rotary) and values.  Ranks as threads then share them N ways, and each answer is held to dense float64 attention
of the same bfloat16 numbers.  The control, which drifts, rounds every partial answer to bfloat16.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.layout import zigzag
from longctx.attention.partial import Partial
from longctx.config import Mesh, ModelSource, PromptSource
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.ring import Ring, Strategy, pass_kv
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import run_threads
from longctx.shapes import Tensor
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.plots import lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.spd_plan import refuse_adapted

CONTROL = "bf16 partials"
BAR = 1.05  # times one rank's error
Inputs = tuple[Tensor, Tensor, Tensor]
Errors = dict[str, list[float]]  # relative to float64, by number of ranks


@dataclass(frozen=True)
class DriftSettings:
    """The settings of configs/bench_drift.yaml that are not a section of their own."""

    tokens: PositiveInt
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None
    ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    gradient_ranks: tuple[PositiveInt, ...]
    out: str | None
    picture: str | None

    def __post_init__(self) -> None:
        for name in ("ranks", "gradient_ranks"):
            counts = getattr(self, name)
            if counts and counts[0] != 1:
                raise ValueError(f"{name}={list(counts)}: begin with 1, to which the others are compared")


@dataclass(frozen=True)
class DriftJob:
    """What the rank that runs the model needs to know."""

    settings: DriftSettings
    model: ModelSource
    folder: Path
    shape: ModelShape
    tokens: tuple[int, ...]
    layers: tuple[int, ...]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention in float64, a head at a time; shares nothing with what is measured."""
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    sharing, heads = q.shape[2] // k.shape[2], []
    for head in range(q.shape[2]):
        q_h, k_h, v_h = q[:, :, head].double(), k[:, :, head // sharing].double(), v[:, :, head // sharing].double()
        scores = q_h @ k_h.mT / math.sqrt(q.shape[3])
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v_h)
    return torch.stack(heads, 2)


def exact_gradients(inputs: Inputs, dout: Tensor) -> Gradients:
    """(dq, dk, dv) of `exact`."""
    leaves = [x.double().requires_grad_() for x in inputs]
    dq, dk, dv = torch.autograd.grad(exact(*leaves), leaves, dout.double())
    return dq, dk, dv


def shared(inputs: Inputs, ranks: int, strategy: Strategy, kernel: Kernel) -> Tensor:
    """Causal attention over ``ranks`` threads, before it is rounded to the model's dtype."""
    layout = zigzag(inputs[0].shape[1], ranks)

    def rank_main(world: Any, rank: int) -> Tensor:
        q, k, v = (layout.shard(x, rank, 1) for x in inputs)
        return strategy(q, k, v, Ring(world.group(rank), layout, layout), kernel).out

    return layout.unshard(run_threads(ranks, rank_main), 1)


def shared_gradients(inputs: Inputs, dout: Tensor, ranks: int, kernel: Kernel) -> Gradients:
    """(dq, dk, dv) over ``ranks`` threads, in the model's dtype."""
    layout = zigzag(dout.shape[1], ranks)

    def rank_main(world: Any, rank: int) -> tuple[Tensor, ...]:
        q, k, v = (layout.shard(x, rank, 1).requires_grad_() for x in inputs)
        out = ring_attention(Ring(world.group(rank), layout, layout), kernel, pass_kv)(q, k, v)
        return torch.autograd.grad(out, (q, k, v), layout.shard(dout, rank, 1))

    dq, dk, dv = (layout.unshard(parts, 1) for parts in zip(*run_threads(ranks, rank_main), strict=True))
    return dq, dk, dv


def in_bfloat16(kernel: Kernel) -> Kernel:
    """``kernel``, whose answers are rounded as if they travelled and added up in the model's dtype."""

    def forward(*given: Any) -> Partial:
        part = kernel.forward(*given)
        return Partial(part.out.bfloat16().float(), part.lse.bfloat16().float())

    return replace(kernel, forward=forward)


def error(got: Tensor, right: Tensor) -> float:
    """The norm of the difference, relative to the norm of ``right``."""
    return float((got.double() - right).norm() / right.norm())


@torch.no_grad()
def captured(engine: Any, tokens: Tensor, layers: Sequence[int]) -> dict[int, Inputs]:
    """What each of ``layers`` hands its attention while the model reads ``tokens`` on this rank alone."""
    from longctx.megatron.attention import Pass
    from longctx.megatron.model import hidden_states, rotary_angles

    kept: dict[int, Inputs] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in layers:
            kept[layer] = (q.contiguous(), k.contiguous(), v.contiguous())
        return engine.kernel.forward(q, k, v, True).out.to(q.dtype)

    angles = rotary_angles(engine.shape, torch.arange(len(tokens)))
    hidden_states(engine.model, tokens.unsqueeze(0), angles, Pass(attend=attend))
    return kept


def run_rank(rank: Rank, job: DriftJob) -> list[dict[str, Any]]:
    """Run the model, then measure each layer."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime

    asked = job.settings
    with runtime(rank, Mesh(), threads=1) as here, Progress(shown=rank.rank == 0) as progress:
        progress.start(f"{job.model.name} reads {asked.tokens:,} tokens", None)
        engine = load_engine(here, job.model, job.shape, job.folder, "auto")
        kept = captured(engine, torch.tensor(job.tokens), job.layers)
        runs = len(asked.ranks) * (len(STRATEGIES) + 1) + len(asked.gradient_ranks)
        progress.start(f"{len(kept)} layers, runs", len(kept) * runs)
        rows = []
        for layer, inputs in kept.items():
            made = output_errors(inputs, asked.ranks, engine.kernel, progress.step)
            gradients = gradient_errors(inputs, layer, asked.gradient_ranks, engine.kernel, progress.step)
            rows.append({"layer": layer, **made, "gradients": gradients})
    return rows


def output_errors(inputs: Inputs, counts: Sequence[int], kernel: Kernel, done: Callable[[], None]) -> dict[str, Errors]:
    """Of each way by number of ranks; ``unrounded`` are those before the answer becomes bfloat16."""
    ways = {name: (strategy, kernel) for name, strategy in STRATEGIES.items()}
    ways[CONTROL] = (pass_kv, in_bfloat16(kernel))
    right, errors, unrounded = exact(*inputs), _none(ways), _none(ways)
    for ranks in counts:
        for way, (strategy, through) in ways.items():
            out = shared(inputs, ranks, strategy, through)
            errors[way].append(error(out.bfloat16(), right))
            unrounded[way].append(error(out, right))
            done()
    return {"errors": errors, "unrounded": unrounded}


def gradient_errors(
    inputs: Inputs, seed: int, counts: Sequence[int], kernel: Kernel, done: Callable[[], None]
) -> Errors:
    """Of dq, dk and dv by number of ranks; the output's gradient is random."""
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    errors = _none(("dq", "dk", "dv"))
    rights = exact_gradients(inputs, dout) if counts else ()
    for ranks in counts:
        grads = shared_gradients(inputs, dout, ranks, kernel)
        for name, got, right in zip(errors, grads, rights, strict=True):
            errors[name].append(error(got, right))
        done()
    return errors


def _none(ways: Iterable[str]) -> Errors:
    return {way: [] for way in ways}


def ratios(rows: list[dict[str, Any]], kind: str, way: str, at: int) -> dict[int, float]:
    """Of each layer, the error of ``way`` at the ``at``-th number of ranks, in errors of one rank."""
    return {row["layer"]: row[kind][way][at] / row[kind][way][0] for row in rows}


def worst(rows: list[dict[str, Any]], kind: str, way: str, at: int) -> tuple[float, int]:
    """The largest of the `ratios`, and its layer."""
    of = ratios(rows, kind, way, at)
    layer = max(of, key=lambda layer: of[layer])
    return of[layer], layer


def table(rows: list[dict[str, Any]], kind: str, counts: Sequence[int]) -> Table:
    """The worst layer of each way (column) at each number of ranks (row)."""
    ways, made = tuple(rows[0][kind]), Table(box=None)
    for column in ("ranks", *ways):
        made.add_column(column, justify="right")
    for at, ranks in enumerate(counts):
        found = (worst(rows, kind, way, at) for way in ways)
        made.add_row(str(ranks), *(f"{ratio:.4f} ({layer})" for ratio, layer in found))
    return made


def show(rows: list[dict[str, Any]], asked: DriftSettings) -> None:
    """What one rank's error is, then the tables, then whether the bar is held."""
    ones = [row["errors"]["pass_kv"][0] for row in rows]
    sums = max(taken for row in rows for way in STRATEGIES for taken in row["unrounded"][way])
    grown, _ = max(worst(rows, "unrounded", way, at) for way in STRATEGIES for at in range(len(asked.ranks)))
    console.print(f"one rank's error: {min(ones):.2e} to {max(ones):.2e} of the output's norm, by layer;")
    console.print(f"before it is rounded to bfloat16: at most {sums:.1e}, and {grown:.2f} times one rank's\n")
    console.print(f"error, in errors of one rank; the worst of {len(rows)} layers (which):")
    console.print(table(rows, "errors", asked.ranks))
    found = [worst(rows, "errors", way, at) for way in STRATEGIES for at in range(len(asked.ranks))]
    if asked.gradient_ranks:
        console.print("\ngradients, by pass_kv:")
        console.print(table(rows, "gradients", asked.gradient_ranks))
        counts = range(len(asked.gradient_ranks))
        found += [worst(rows, "gradients", way, at) for way in rows[0]["gradients"] for at in counts]
    ratio, layer = max(found)
    console.print(f"\n{'no drift' if ratio <= BAR else 'DRIFT'}: at most {ratio:.6f} (layer {layer}), the bar is {BAR}")


def draw(rows: list[dict[str, Any]], asked: DriftSettings, title: str) -> None:
    """Ratio over the number of ranks, of the strategies together and of the control."""
    series: dict[str, list[float]] = {}
    for name, ways in ((CONTROL, (CONTROL,)), ("float32 partials (ours)", tuple(STRATEGIES))):
        each = [
            [ratio for way in ways for ratio in ratios(rows, "errors", way, at).values()]
            for at in range(len(asked.ranks))
        ]
        series |= {f"{name}, worst layer": [*map(max, each)], f"{name}, median layer": [*map(median, each)]}
    style: dict[str, Any] = {"levels": [BAR], "ticks": asked.ranks, "log_y": False}
    y = "error of the output, in errors of one rank"
    lines(str(asked.picture), asked.ranks, series, title=title, x="ranks", y=y, **style)


def task(config: DictConfig) -> None:
    """Measure; show, write and draw."""
    warm_up_ranks(["longctx.infer.engine", "longctx.megatron.attention", "recipes.common.progress"])
    settings, model = top_level(config, DriftSettings), section(config, "model", ModelSource)
    if model.dtype != "bfloat16":
        raise ValueError(f"model.dtype={model.dtype}: drift is looked for in bfloat16; use model.dtype=bfloat16")
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    job = _job(settings, model)
    rows = on_ranks(Mesh(), run_rank, job)
    if rows is None:
        return
    show(rows, settings)
    if settings.out:
        about = {"model": model.name, "tokens": settings.tokens, "ranks": settings.ranks}
        write_result(settings.out, {**provenance(), **about, "gradient_ranks": settings.gradient_ranks, "rows": rows})
    if settings.picture:
        draw(rows, settings, f"{model.name}, bfloat16, {settings.tokens:,} tokens, {len(rows)} layers")


def _job(settings: DriftSettings, model: ModelSource) -> DriftJob:
    folder = locate(model, say)
    refuse_adapted(folder, "recipes.bench drift")
    shape = shape_of(folder)
    if settings.tokens > shape.max_positions:
        raise ValueError(
            f"tokens={settings.tokens}: {model.name} was made for {shape.max_positions:,}; use at most that"
        )
    layers = settings.layers or tuple(range(shape.layers))
    if max(layers) >= shape.layers:
        raise ValueError(f"layers={max(layers)}: {model.name} has layers 0 to {shape.layers - 1}")
    tokens, available = prompt_tokens(PromptSource(pydoc="all", tokens=settings.tokens), tokenizer_of(folder))
    if available < settings.tokens:
        raise ValueError(f"tokens={settings.tokens}: the text has {available:,} tokens; use at most that")
    return DriftJob(settings, model, folder, shape, tuple(tokens), layers)
