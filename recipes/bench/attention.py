"""Attention of one layer, forward and backward: our strategies beside Transformer Engine's context parallelism.

python -m recipes.bench attention

The variants take turns within each round.  Before one is timed, its output and its gradients are compared with float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.attention import flash_attn
from longctx.attention.backends import checked_kernel, kernel_for
from longctx.attention.kernel import Kernel, attend_over, reference, tile_gradients
from longctx.attention.layout import contiguous, zigzag
from longctx.attention.mask import causal_within
from longctx.attention.tiles import visible_tiles
from longctx.attention.verify import TOLERANCE
from longctx.config import Mesh
from longctx.config.run import KernelName
from longctx.parallel.comm import Comm
from longctx.parallel.hybrid import hybrid
from longctx.parallel.launch import Rank
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.ulysses import Attention
from longctx.parallel.validate import refuse_unfit
from longctx.shapes import Tensor
from recipes.bench import peers, te_peer
from recipes.bench.gpu_parts import device_seconds
from recipes.bench.timing import barrier, gather_numbers, measure_in_rounds
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime

RECIPE = "recipes.bench attention"
Variant = Literal["pass_kv", "pass_q", "all_gather_kv", "ulysses", "hybrid"]


@dataclass(frozen=True)
class AttentionSettings:
    """Top-level settings of configs/bench/attention.yaml."""

    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8192,)
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("pass_kv", "all_gather_kv")
    peers: tuple[te_peer.TEPeer, ...] = ()
    window: PositiveInt | None = None
    kernel: KernelName = "auto"
    checked: PositiveInt = 512
    rounds: PositiveInt = 3
    out: str | None = None


@dataclass(frozen=True)
class AttentionJob:
    """The inputs of the benchmark that every rank gets."""

    settings: AttentionSettings
    target: Target


@dataclass(frozen=True)
class AttentionTimes:
    """The slowest rank's seconds of a variant's forward and backward, by round, over ``tokens`` tokens."""

    variant: str
    tokens: int
    forward: list[float]
    backward: list[float]


@dataclass(frozen=True)
class AttentionResult:
    """Times of all exact variants; ``errors`` by variant, and in ``refused`` the reason for each one without times.

    An error is the largest relative error of out, dq, dk and dv on any rank, against float64, over ``checked`` tokens.
    """

    checked: int
    errors: dict[str, float]
    refused: dict[str, str]
    times: list[AttentionTimes]


def prepare(config: DictConfig) -> AttentionJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, AttentionSettings)
    refuse_unwritable(settings.out)
    unused = ("tp", "dp", "pp")
    target = resolve_target(config, RECIPE, unused_axes=unused, needs_weights=False, spd="ignore")
    mesh, shape = target.mesh, target.shape
    if mesh.context < 2:
        raise ValueError(f"the mesh ({mesh}) has one rank: use mesh.ring=2 or more")
    kernel_for(settings.kernel, target.run.device, target.model.dtype)
    if "ulysses" in settings.variants:
        refuse_unfit(Mesh(ulysses=mesh.context), shape)
    if "hybrid" in settings.variants and min(mesh.ulysses, mesh.ring) < 2:
        raise ValueError(
            f"variants=hybrid needs mesh.ulysses and mesh.ring of 2 or more, not {mesh.ulysses} and {mesh.ring}; use "
            "ulysses or pass_kv on one axis"
        )
    te_peer.refuse_unfit_peers(settings.peers, target, settings.lengths, settings.window)
    return AttentionJob(settings, target)


def run_rank(rank: Rank, job: AttentionJob) -> AttentionResult:
    """Check every variant against float64, then time the exact ones.

    All ranks return the same result, except for the reasons of a failure, which are each rank's own.
    """
    settings, target = job.settings, job.target
    step = 2 * target.mesh.context
    checked = -(-settings.checked // step) * step
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    times: list[AttentionTimes] = []
    bound = TOLERANCE[getattr(torch, target.model.dtype)]
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        dtype, head_dim = target.model.dtype, target.shape.head_dim
        kernel = checked_kernel(settings.kernel, runtime.device, dtype, head_dim, runtime.slowest)
        # 1. Which variants are exact.
        for name in (*settings.variants, *settings.peers):
            error, reason = check(name, job, runtime, kernel, checked)
            if reason:
                refused[name] = reason
            elif not error <= bound:
                refused[name] = f"relative error {error:.1e}, above {bound:.1e}"
            if math.isfinite(error):
                errors[name] = error
        # 2. Their times, by length.
        names = [name for name in errors if name not in refused]
        progress.start("runs", len(names) * (settings.rounds + 1) * len(settings.lengths))
        for length in settings.lengths:
            times += time_variants(job, runtime, names, kernel, length, progress)
    return AttentionResult(checked, errors, refused, times)


def attention_of(name: str, job: AttentionJob, runtime: Runtime, kernel: Kernel, length: int) -> Attention:
    """Return the differentiable attention called ``name``, of this rank's zigzag rows of ``length`` tokens.

    ``pass_kv``, ``pass_q``, ``all_gather_kv`` and ``ulysses`` run over all context ranks, ``hybrid`` over the mesh's
    two axes.
    """
    settings, mask = job.settings, causal_within(job.settings.window)
    if name in settings.peers:
        return te_peer.te_attention(name, runtime, job.target.shape, settings.window)
    layout, one, every = zigzag(length, runtime.context.size), runtime.tp, runtime.context
    assert one.size == 1
    groups = {"ulysses": (every, one), "hybrid": (runtime.ulysses, runtime.ring)}.get(name, (one, every))
    return hybrid(*groups, layout, mask).attention(kernel, STRATEGIES.get(name, STRATEGIES["pass_kv"]))


def random_inputs(job: AttentionJob, runtime: Runtime, length: int) -> list[Tensor]:
    """Return q, k, v and dout of the whole sequence, [1 length h d], the same on every rank."""
    shape, generator = job.target.shape, torch.Generator(runtime.device).manual_seed(length)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    dtype = getattr(torch, job.target.model.dtype)
    return [
        torch.randn(1, length, h, shape.head_dim, generator=generator, device=runtime.device).to(dtype) for h in heads
    ]


def check(name: str, job: AttentionJob, runtime: Runtime, kernel: Kernel, length: int) -> tuple[float, str]:
    """Return the largest relative error of out, dq, dk and dv on any rank, and "" as the reason for a refusal.

    If the variant fails on a rank, the error is infinite, and the reason is the first line of what it raised.  That
    rank also prints the reason at once.  If it fails there alone, before its last exchange with other ranks, these wait
    for it until the run ends by run.timeout_minutes.
    """
    inputs, layout = random_inputs(job, runtime, length), zigzag(length, runtime.context.size)
    *mine, dout = (layout.shard(x, runtime.context.rank, 1) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in mine]
    error, reason = math.inf, ""
    try:
        out = attention_of(name, job, runtime, kernel, length)(*leaves)
        actual = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        exact = (layout.shard(x, runtime.context.rank, 1) for x in exact_attention(inputs, job.settings.window))
        rank_errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]
        error = max(x if math.isfinite(x) else math.inf for x in rank_errors)
    except Exception as raised:  # Transformer Engine's have no common class; this rank must still meet the others
        reason = f"{type(raised).__name__}: {raised}".splitlines()[0][:120]
        console.print(f"rank {runtime.context.rank}: {name} failed: {reason}", markup=False)
    errors, failures = gather_numbers(runtime.context, error, float(bool(reason)))
    return max(errors), reason or ("failed on another rank" if any(failures) else "")


def exact_attention(inputs: Sequence[Tensor], window: int | None) -> list[Tensor]:
    """Return out, dq, dk and dv of the whole sequence in float64; ``inputs`` are q, k, v and dout [1 s h d]."""
    q, k, v, dout = (x.double() for x in inputs)
    (spans,) = contiguous(q.shape[1], 1).ranks
    tiles = visible_tiles(spans, spans, causal_within(window))
    whole = attend_over(q, k, v, tiles, reference)
    return [whole.out, *tile_gradients(dout, q, k, v, whole, tiles, reference)]


def time_variants(
    job: AttentionJob, runtime: Runtime, names: Sequence[str], kernel: Kernel, length: int, progress: Progress
) -> list[AttentionTimes]:
    """Time forward and backward of the variants ``names``, in turn, on the same rows of ``length`` tokens."""
    layout = zigzag(length, runtime.context.size)
    *rows_of_rank, dout = (layout.shard(x, runtime.context.rank, 1) for x in random_inputs(job, runtime, length))
    functions = {name: attention_of(name, job, runtime, kernel, length) for name in names}

    def measure(name: str) -> tuple[float, float]:
        leaves = [x.clone().requires_grad_() for x in rows_of_rank]
        results: list[Tensor] = []
        forward = slowest_seconds(runtime.context, lambda: results.append(functions[name](*leaves)))
        backward = slowest_seconds(runtime.context, lambda: results[0].backward(dout))
        progress.step()
        return forward, backward

    by_variant = measure_in_rounds(names, job.settings.rounds, measure)
    return [
        AttentionTimes(name, length, *(list(seconds) for seconds in zip(*each.timed, strict=True)))
        for name, each in zip(names, by_variant, strict=True)
    ]


def slowest_seconds(group: Comm, work: Callable[[], object]) -> float:
    """Start ``work`` on all ranks of ``group`` at once; return the slowest rank's seconds until its device is done."""
    barrier(group)
    (seconds,) = gather_numbers(group, device_seconds(work))
    return max(seconds)


def show(result: AttentionResult) -> None:
    """Print a table of errors and median times."""
    table = Table(box=None)
    for column in ("attention of a layer", "tokens", "forward, ms", "backward, ms", "relative error"):
        table.add_column(column, justify="left" if column == "attention of a layer" else "right")
    for each in result.times:
        milliseconds = (f"{1e3 * median(seconds):,.2f}" for seconds in (each.forward, each.backward))
        table.add_row(each.variant, f"{each.tokens:,}", *milliseconds, f"{result.errors[each.variant]:.1e}")
    console.print(table)
    for name, reason in result.refused.items():
        console.print(f"{name} is not timed: {reason}", markup=False)


def task(config: DictConfig) -> None:
    """Run the ranks and show the times; also write them if ``out`` is set."""
    warm_up_ranks(["longctx.megatron.runtime", "recipes.bench.attention"])
    job = prepare(config)
    result = on_ranks(job.target.mesh, run_rank, job)
    if result is None:
        return
    show(result)
    if job.settings.out:
        write_result(job.settings.out, {**about(job), **asdict(result)})


def about(job: AttentionJob) -> Mapping[str, object]:
    """Return the settings, the versions of the peers and the provenance, for the written result."""
    settings, target = job.settings, job.target
    packages = ("transformer_engine", *(("flash_attn",) if flash_attn.installed else ()))
    versions = {name: peers.installed_version(name) for name in packages if settings.peers}
    return {
        **provenance(),
        "model": target.model.name,
        "dtype": target.model.dtype,
        "device": target.run.device,
        "mesh": str(target.mesh),
        "window": settings.window,
        "kernel": settings.kernel,
        "peers": versions,
    }
