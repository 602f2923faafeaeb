"""Parts of the check of a GPU that run attention: kernels against float64, a ring's tiles against one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from longctx.attention.backends import KERNELS, installed, kernel_for
from longctx.attention.kernel import Gradients, Kernel, attend_tiles, tile_gradients
from longctx.attention.layout import Layout, zigzag
from longctx.attention.mask import CAUSAL
from longctx.attention.partial import Partial, accumulation_dtype, empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.attention.verify import refuse_inexact

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime
    from recipes.bench.gpu_check import GpuCheckJob

TableRow = dict[str, Any]


def check_kernels(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Compare out, log-sum-exp and gradients of every kernel that takes this device and dtype with float64.

    Kernels whose package is missing are left out.  A row's ``verdict`` is "exact", or the error.
    """
    table_rows = []
    for name, kernel in KERNELS.items():
        takes = runtime.device.type in kernel.devices and job.dtype in kernel.dtypes
        if not takes or not installed(name):
            continue
        try:
            refuse_inexact(kernel, runtime.device, job.dtype, job.target.shape.head_dim)
            verdict = "exact"
        except Exception as error:  # Triton's have no common class
            verdict = (str(error).splitlines() or [type(error).__name__])[0]
        table_rows.append({"kernel": name, "dtype": job.target.model.dtype, "verdict": verdict})
    return table_rows


def check_tiles(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Run the tiles of every rank of a ring, one after the other, and compare them with one call for the sequence.

    A row is for one length and one number of ranks.  ``forward`` and ``backward`` are the ring's median seconds over
    those of the one call.  An error is the norm of the difference over the norm of the one call's result.
    """
    kernel, table_rows = kernel_of(job, runtime), []
    for length in job.settings.lengths:
        inputs = _random_inputs(job, runtime, length)
        alone = _time_attention(inputs, zigzag(length, 1), kernel, job.settings.rounds)
        for ranks in job.settings.ranks:
            ring = _time_attention(inputs, zigzag(length, ranks), kernel, job.settings.rounds)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(ring.tensors, alone.tensors, strict=True)]
            table_rows.append(
                {
                    "tokens": length,
                    "ranks": ranks,
                    "one_call_s": alone.forward_s,
                    "forward": ring.forward_s / alone.forward_s,
                    "backward": ring.backward_s / alone.backward_s,
                    "error_out": errors[0],
                    "error_gradients": max(errors[1:]),
                }
            )
    return table_rows


def kernel_of(job: GpuCheckJob, runtime: Runtime) -> Kernel:
    """Return the kernel that ``context.kernel`` names or chooses for the runtime's device."""
    return kernel_for(job.target.context.kernel, runtime.device.type, job.target.model.dtype)


def _random_inputs(job: GpuCheckJob, runtime: Runtime, length: int) -> list[torch.Tensor]:
    """Return random q, k, v and dout of one layer, [1 length h d]."""
    shape, generator = job.target.shape, torch.Generator(runtime.device).manual_seed(length)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [
        torch.randn(1, length, h, shape.head_dim, generator=generator, device=runtime.device).to(job.dtype)
        for h in heads
    ]


@dataclass(frozen=True)
class _Attention:
    """Median seconds of attention's forward and of its backward; ``tensors``: out, dq, dk, dv in sequence order."""

    forward_s: float
    backward_s: float
    tensors: list[torch.Tensor]


def _time_attention(inputs: Sequence[torch.Tensor], layout: Layout, kernel: Kernel, rounds: int) -> _Attention:
    """Run attention of every rank of ``layout`` in turn, on one device; return its median seconds and its results.

    ``inputs`` are q, k, v and dout of the whole sequence.  Forward and backward are timed ``rounds`` times, after a
    first round that is not.
    """
    shards = [[layout.shard(x, rank, 1) for x in inputs] for rank in range(layout.size)]
    forward, backward = [], []
    partials: list[Partial] = []
    gradients: list[Gradients] = []
    for _ in range(rounds + 1):
        forward.append(device_seconds(lambda: partials.__setitem__(slice(None), _forward(shards, layout, kernel))))
        backward.append(
            device_seconds(lambda: gradients.__setitem__(slice(None), _backward(shards, layout, kernel, partials)))
        )
    whole = [layout.unshard([partial.out for partial in partials], 1)]
    whole += [layout.unshard(list(each), 1) for each in zip(*gradients, strict=True)]
    return _Attention(median(forward[1:]), median(backward[1:]), [x.float() for x in whole])


def _forward(shards: Sequence[Sequence[torch.Tensor]], layout: Layout, kernel: Kernel) -> list[Partial]:
    partials = []
    for rank, (q, *_) in enumerate(shards):
        partials.append(empty_partial(q))
        for owner, (_, k, v, _) in enumerate(shards):
            attend_tiles(partials[-1], q, k, v, visible_tiles(layout.ranks[rank], layout.ranks[owner], CAUSAL), kernel)
    return partials


def _backward(
    shards: Sequence[Sequence[torch.Tensor]], layout: Layout, kernel: Kernel, partials: Sequence[Partial]
) -> list[Gradients]:
    """Return (dq, dk, dv) of each rank's rows, computed for all ranks on this one device.

    ``shards`` has q, k, v and dout of each rank, ``partials`` its attention output.
    """
    sums = [[torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in shard[:3]] for shard in shards]
    for rank, ((q, *_, dout), partial) in enumerate(zip(shards, partials, strict=True)):
        for owner, (_, k, v, _) in enumerate(shards):
            tiles = visible_tiles(layout.ranks[rank], layout.ranks[owner], CAUSAL)
            dq, dk, dv = tile_gradients(dout, q, k, v, partial, tiles, kernel)
            for total, gradient in ((sums[rank][0], dq), (sums[owner][1], dk), (sums[owner][2], dv)):
                total.add_(gradient)
    return [(dq, dk, dv) for dq, dk, dv in sums]


def device_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of ``work``, until the GPU has finished it."""
    _synchronize()
    began = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
