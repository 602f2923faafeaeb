"""Error of bfloat16 attention against float64 by number of ranks, for each layer of a real model.

    python -m recipes.bench drift out=drift.json picture=drift.svg

The model reads real text once, on one rank, and each layer's queries, keys (both after rotary embedding) and values are
kept.  Ranks, as threads, then shard them N ways.  The error of each output is taken against dense float64 attention of
the same bfloat16 numbers.  A control, which drifts, rounds every partial attention to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING, Annotated

import torch
from omegaconf import DictConfig
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.layout import zigzag
from longctx.attention.partial import Partial
from longctx.parallel.launch import Rank
from longctx.parallel.ring import Ring, Strategy, pass_kv
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadWorld, run_threads
from longctx.shapes import AnyShape, Int, Keys, Queries, Tensor
from recipes.bench.timing import read_tokens, refuse_beyond_model
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.plots import draw_lines
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine

CONTROL = "bf16 partials"
BAR = 1.05  # the largest error that counts as no drift, as a multiple of one rank's error
Inputs = tuple[Tensor, Tensor, Tensor]  # queries [b s hq d], keys and values [b s hk d]
Done = Callable[[], None]  # called after each run
Errors = dict[str, list[float]]  # relative to float64, by variant (or gradient) and number of ranks


@dataclass(frozen=True)
class DriftSettings:
    """Top-level settings of configs/bench/drift.yaml; ``ranks`` and ``gradient_ranks`` begin with 1."""

    tokens: PositiveInt = 1021
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32)
    gradient_ranks: tuple[PositiveInt, ...] = (1, 2, 8)
    out: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "gradient_ranks"):
            counts = getattr(self, name)
            if counts and counts[0] != 1:
                raise ValueError(f"{name}={list(counts)} does not begin with the baseline: put 1 first")


@dataclass(frozen=True)
class DriftJob:
    """The inputs of the rank that runs the model; ``layers`` are those to measure."""

    settings: DriftSettings
    target: Target
    tokens: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors of one layer's attention, against float64.

    ``errors`` are those of its output in bfloat16, ``unrounded`` of its output before rounding, and ``gradients`` of
    dq, dk and dv with pass-KV.
    """

    layer: int
    errors: Errors
    unrounded: Errors
    gradients: Errors


def prepare(config: DictConfig) -> DriftJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, DriftSettings)
    refuse_unwritable(settings.out)
    refuse_unwritable(settings.picture, "picture")
    target = resolve_target(config, "recipes.bench drift", spd="refuse")
    if target.model.dtype != "bfloat16":
        raise ValueError(f"model.dtype={target.model.dtype}: drift is measured in bfloat16; use model.dtype=bfloat16")
    if set(target.shape.windows) != {None} or target.shape.sinks:
        raise ValueError(
            f"{target.model.name} has windows or sinks, which this benchmark leaves out: use model=smollm2_135m"
        )
    refuse_beyond_model(target, tokens=settings.tokens)
    layers = settings.layers or tuple(range(target.shape.layers))
    if max(layers) >= target.shape.layers:
        raise ValueError(
            f"layers={max(layers)}: no such layer; use 0 to {target.shape.layers - 1} of {target.model.name}"
        )
    return DriftJob(settings, target, read_tokens(target, "tokens", settings.tokens), layers)


def run_rank(rank: Rank, job: DriftJob) -> list[LayerErrors]:
    """Run the model on this rank alone, then measure each layer on threads."""
    settings, model, errors = job.settings, job.target.model, []
    with job.target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        progress.start(f"{model.name} reads {settings.tokens:,} tokens", None)
        engine = job.target.load_engine(runtime)
        inputs_by_layer = capture_attention_inputs(engine, torch.tensor(job.tokens), job.layers)
        runs = len(settings.ranks) * (len(STRATEGIES) + 1) + len(settings.gradient_ranks)
        progress.start(f"{len(inputs_by_layer)} layers, runs", len(inputs_by_layer) * runs)
        for layer, inputs in inputs_by_layer.items():
            rounded, unrounded = output_errors(inputs, settings.ranks, engine.kernel, progress.step)
            gradients = gradient_errors(inputs, layer, settings.gradient_ranks, engine.kernel, progress.step)
            errors.append(LayerErrors(layer, rounded, unrounded, gradients))
    return errors


@torch.no_grad()
def capture_attention_inputs(engine: Engine, tokens: Int[Tensor, " s"], layers: Sequence[int]) -> dict[int, Inputs]:
    """Return the attention inputs of each of ``layers`` while the model reads ``tokens`` on this rank alone."""
    from longctx.megatron.attention import Pass, rotary_tables
    from longctx.megatron.model import hidden_states

    captured: dict[int, Inputs] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in layers:
            captured[layer] = (q.contiguous(), k.contiguous(), v.contiguous())
        return engine.kernel.forward(q, k, v, True).out.to(q.dtype)

    rotary = rotary_tables(engine.shape, torch.arange(len(tokens)))
    hidden_states(engine.model, tokens.unsqueeze(0), Pass(attend=attend, rotary=rotary))
    return captured


def exact(q: Queries, k: Keys, v: Keys) -> Queries:
    """Return dense causal attention in float64, one head at a time; it shares no code with the measured kernels."""
    is_later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    queries_per_kv_head, heads = q.shape[2] // k.shape[2], []
    for head in range(q.shape[2]):
        kv_head = head // queries_per_kv_head
        q_h, k_h, v_h = q[:, :, head].double(), k[:, :, kv_head].double(), v[:, :, kv_head].double()
        scores = q_h @ k_h.mT / math.sqrt(q.shape[3])
        heads.append(scores.masked_fill(is_later, -math.inf).softmax(-1) @ v_h)
    return torch.stack(heads, 2)


def exact_gradients(inputs: Inputs, dout: Queries) -> Gradients:
    """Return (dq, dk, dv) of `exact` in float64, for the output's gradient ``dout``."""
    leaves = [x.double().requires_grad_() for x in inputs]
    dq, dk, dv = torch.autograd.grad(exact(*leaves), leaves, dout.double())
    return dq, dk, dv


def attend_on_threads(inputs: Inputs, ranks: int, strategy: Strategy, kernel: Kernel) -> Queries:
    """Return causal attention sharded zigzag over ``ranks`` threads, before it is rounded to the model's dtype."""
    layout = zigzag(inputs[0].shape[1], ranks)

    def rank_main(world: ThreadWorld, rank: int) -> Tensor:
        q, k, v = (layout.shard(x, rank, 1) for x in inputs)
        return strategy(q, k, v, Ring(world.group(rank), layout, layout), kernel).out

    return layout.unshard(run_threads(ranks, rank_main), 1)


def gradients_on_threads(inputs: Inputs, dout: Queries, ranks: int, kernel: Kernel) -> Gradients:
    """Return (dq, dk, dv) of pass-KV over ``ranks`` threads, in the model's dtype."""
    layout = zigzag(dout.shape[1], ranks)

    def rank_main(world: ThreadWorld, rank: int) -> tuple[Tensor, ...]:
        q, k, v = (layout.shard(x, rank, 1).requires_grad_() for x in inputs)
        out = ring_attention(Ring(world.group(rank), layout, layout), kernel, pass_kv)(q, k, v)
        return torch.autograd.grad(out, (q, k, v), layout.shard(dout, rank, 1))

    dq, dk, dv = (layout.unshard(shards, 1) for shards in zip(*run_threads(ranks, rank_main), strict=True))
    return dq, dk, dv


def in_bfloat16(kernel: Kernel) -> Kernel:
    """Return ``kernel`` with its partial attentions rounded to bfloat16, as if ranks sent and merged bfloat16."""

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
        partial = kernel.forward(q, k, v, causal)
        return Partial(partial.out.bfloat16().float(), partial.lse.bfloat16().float())

    return replace(kernel, forward=forward)


def relative_error(x: AnyShape, reference: AnyShape) -> float:
    """Return the norm of ``x - reference``, relative to the norm of ``reference``."""
    return float((x.double() - reference).norm() / reference.norm())


def output_errors(inputs: Inputs, counts: Sequence[int], kernel: Kernel, done: Done) -> tuple[Errors, Errors]:
    """Return the attention output's relative errors: after rounding to bfloat16, and before.

    Each is a list by variant, with an error for each of ``counts`` ranks.  The variants are the strategies and
    `CONTROL`, which rounds every partial attention.  ``done`` is called after each run.
    """
    variants = {name: (strategy, kernel) for name, strategy in STRATEGIES.items()}
    variants[CONTROL] = (pass_kv, in_bfloat16(kernel))
    reference = exact(*inputs)
    rounded: Errors = {name: [] for name in variants}
    unrounded: Errors = {name: [] for name in variants}
    for ranks in counts:
        for name, (strategy, variant_kernel) in variants.items():
            out = attend_on_threads(inputs, ranks, strategy, variant_kernel)
            rounded[name].append(relative_error(out.bfloat16(), reference))
            unrounded[name].append(relative_error(out, reference))
            done()
    return rounded, unrounded


def gradient_errors(inputs: Inputs, seed: int, counts: Sequence[int], kernel: Kernel, done: Done) -> Errors:
    """Return the relative errors of dq, dk and dv by name, for each of ``counts`` ranks.

    ``seed`` draws the output's gradient.  ``done`` is called after each run.
    """
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    errors: Errors = {"dq": [], "dk": [], "dv": []}
    references = exact_gradients(inputs, dout) if counts else ()
    for ranks in counts:
        gradients = gradients_on_threads(inputs, dout, ranks, kernel)
        for name, gradient, reference in zip(errors, gradients, references, strict=True):
            errors[name].append(relative_error(gradient, reference))
        done()
    return errors


def ratios(by_layer: Mapping[int, Errors], name: str, i: int) -> dict[int, float]:
    """Return, by layer, the error of variant ``name`` at the ``i``-th number of ranks over its error on one rank."""
    return {layer: errors[name][i] / errors[name][0] for layer, errors in by_layer.items()}


def worst(by_layer: Mapping[int, Errors], names: Iterable[str], indices: Iterable[int]) -> tuple[float, int]:
    """Return the largest of the `ratios` of the variants ``names``, and its layer.

    ``indices`` are the indices of the numbers of ranks to look at.
    """
    pairs = [(r, layer) for i in indices for name in names for layer, r in ratios(by_layer, name, i).items()]
    return max(pairs, key=itemgetter(0))


def ratio_table(by_layer: Mapping[int, Errors], counts: Sequence[int]) -> Table:
    """Return a table of each variant's (column) worst ratio and its layer, at each number of ranks (row)."""
    names, table = tuple(next(iter(by_layer.values()))), Table(box=None)
    for column in ("ranks", *names):
        table.add_column(column, justify="right")
    for i, ranks in enumerate(counts):
        table.add_row(str(ranks), *("{:.4f} ({})".format(*worst(by_layer, (name,), (i,))) for name in names))
    return table


def show(layers: list[LayerErrors], settings: DriftSettings) -> None:
    """Print one rank's error, the tables of ratios, and whether the worst ratio exceeds `BAR`."""
    rounded, unrounded, gradients = (
        {each.layer: getattr(each, kind) for each in layers} for kind in ("errors", "unrounded", "gradients")
    )
    # 1. One rank's error, rounded and unrounded.
    one_rank = [errors["pass_kv"][0] for errors in rounded.values()]
    largest = max(error for errors in unrounded.values() for name in STRATEGIES for error in errors[name])
    growth, _ = worst(unrounded, STRATEGIES, range(len(settings.ranks)))
    console.print(f"error on one rank: {min(one_rank):.2e} to {max(one_rank):.2e} of the output's norm, by layer")
    console.print(f"before rounding to bfloat16: at most {largest:.1e}, at most {growth:.2f} times one rank's error\n")
    # 2. Errors of more ranks.
    console.print(f"error divided by one rank's error, on the worst of {len(layers)} layers (in brackets: its number):")
    console.print(ratio_table(rounded, settings.ranks))
    ratio, layer = worst(rounded, STRATEGIES, range(len(settings.ranks)))
    if settings.gradient_ranks:
        console.print("\ngradients, by pass_kv:")
        console.print(ratio_table(gradients, settings.gradient_ranks))
        counts = range(len(settings.gradient_ranks))
        ratio, layer = max((ratio, layer), worst(gradients, ("dq", "dk", "dv"), counts))
    verdict = "no drift" if ratio <= BAR else "DRIFT"
    console.print(f"\n{verdict}: at most {ratio:.6f} (layer {layer}), and up to {BAR} counts as no drift")


def draw(layers: list[LayerErrors], settings: DriftSettings, title: str, picture: str) -> None:
    """Draw the worst and the median ratio by number of ranks, for all strategies together and for the control."""
    by_layer = {each.layer: each.errors for each in layers}
    series: dict[str, list[float]] = {}
    for label, names in ((CONTROL, (CONTROL,)), ("float32 partials (ours)", tuple(STRATEGIES))):
        counts = range(len(settings.ranks))
        by_count = [[ratio for name in names for ratio in ratios(by_layer, name, i).values()] for i in counts]
        series |= {f"{label}, worst layer": [*map(max, by_count)], f"{label}, median layer": [*map(median, by_count)]}
    y = "error of the output, in errors of one rank"
    ranks = settings.ranks
    draw_lines(picture, ranks, series, title=title, x="ranks", y=y, levels=[BAR], ticks=ranks, log_y=False)


def task(config: DictConfig) -> None:
    """Measure on one rank; show, write and draw the errors."""
    warm_up_ranks(["longctx.infer.engine", "longctx.megatron.attention", "recipes.common.progress"])
    job = prepare(config)
    layers = on_ranks(job.target.mesh, run_rank, job)
    if layers is None:
        return
    settings, name = job.settings, job.target.model.name
    show(layers, settings)
    if settings.out:
        inputs: dict[str, object] = {"model": name, "tokens": settings.tokens, "ranks": settings.ranks}
        inputs["gradient_ranks"] = settings.gradient_ranks
        write_result(settings.out, {**provenance(), **inputs, "rows": [asdict(each) for each in layers]})
    if settings.picture:
        title = f"{name}, bfloat16, {settings.tokens:,} tokens, {len(layers)} layers"
        draw(layers, settings, title, settings.picture)
