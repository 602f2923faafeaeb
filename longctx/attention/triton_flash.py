"""Kernel ``triton``: longctx's flash attention in Triton; its partials are float32 even for half-precision inputs.

The kernels of other libraries for GPUs round the output of every tile to the input dtype.
"""

import importlib.util
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.partial import Partial
from longctx.shapes import Keys, LogSumExp, Queries, Tensor

installed = importlib.util.find_spec("triton") is not None


class BlockSizes(NamedTuple):
    """Sizes of a Triton program: query rows and keys per block, warps, and stages of the pipeline that loads blocks."""

    rows: int
    keys: int
    warps: int
    stages: int


def blocks_for(kernel: str, head_dim: int, dtype: torch.dtype) -> BlockSizes:
    """Return the sizes for ``kernel`` (forward, backward_q or backward_kv), which fit a GPU's registers and memory.

    docs/results/gpu/triton.md lists what the compiled kernels use.
    """
    if dtype == torch.float32 or head_dim > 128:
        return BlockSizes(32, 32, 8, 2)
    if kernel == "forward":
        return BlockSizes(128, 64, 8, 2)
    return BlockSizes(64 if kernel == "backward_q" else 32, 64, 4 if head_dim <= 64 else 8, 2)


def arguments(kernel: str, q: Queries, k: Keys, causal: bool) -> dict[str, Any]:
    """Return the arguments, by name, that ``kernel`` (see `blocks_for`) takes besides tensors."""
    blocks, d = blocks_for(kernel, q.shape[3], q.dtype), q.shape[3]
    return {
        "sq": q.shape[1], "sk": k.shape[1], "hq": q.shape[2], "hk": k.shape[2], "scale": d**-0.5,
        "CAUSAL": causal, "D": d, "WIDTH": max(16, 1 << (d - 1).bit_length()), "ROWS": blocks.rows,
        "KEYS": blocks.keys, "INTERPRETED": in_interpreter(),
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


def in_interpreter() -> bool:
    """Return True if Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``): slow, for tests."""
    if not installed:
        return False
    from longctx.attention import triton_kernels

    return triton_kernels.IN_INTERPRETER


def _launch(kernel: str, q: Queries, k: Keys, causal: bool, *tensors: Tensor) -> None:
    """Run ``kernel`` on ``tensors``, with one program for each block, head and sequence."""
    from longctx.attention import triton_kernels

    options = arguments(kernel, q, k, causal)
    x, size = (k, options["KEYS"]) if kernel == "backward_kv" else (q, options["ROWS"])
    grid = (-(-x.shape[1] // size), x.shape[0] * x.shape[2])
    getattr(triton_kernels, kernel)[grid](*tensors, **options)


def _flash_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _launch("forward", q, k, causal, q, k, v, out, lse)
    return Partial(out, lse)


def _flash_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    delta = (dout.float() * out.float()).sum(-1)
    dout, q, k, v, lse = (x.contiguous() for x in (dout.to(q.dtype), q, k, v, lse))
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    _launch("backward_q", q, k, causal, dout, q, k, v, lse, delta, dq)
    _launch("backward_kv", q, k, causal, dout, q, k, v, lse, delta, dk, dv)
    return dq, dk, dv


def merge_arguments(part: Queries, first: int, length: int) -> dict[str, Any]:
    """Return the arguments, by name, of the kernel ``merge`` besides tensors.

    The rows of ``part`` are merged into the rows from ``first`` on of a partial of ``length`` rows.
    """
    d = part.shape[3]
    return {
        "sq": part.shape[1], "length": length, "first": first, "hq": part.shape[2], "D": d,
        "WIDTH": max(16, 1 << (d - 1).bit_length()), "ROWS": 16, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def _merge(total: Partial, rows: slice, part: Partial) -> None:
    """`merge_` in one launch, which reads and writes every number once."""
    from longctx.attention import triton_kernels

    assert total.out.is_contiguous() and total.lse.is_contiguous() and part.out.shape[1]
    length = total.out.shape[1]
    options = merge_arguments(part.out, rows.indices(length)[0], length)
    grid = (-(-options["sq"] // options["ROWS"]), part.out.shape[0] * options["hq"])
    triton_kernels.merge[grid](total.out, total.lse, part.out.contiguous(), part.lse.contiguous(), **options)


triton_flash = Kernel(
    "triton",
    _flash_forward,
    _flash_backward,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    devices=("cuda",),
    merge=_merge,
)
# The same code on a CPU, where Triton's interpreter runs it.
interpreted = replace(triton_flash, devices=("cpu",))
