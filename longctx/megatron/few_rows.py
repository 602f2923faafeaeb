"""The GEMM of few rows with a weight in inference; decoding on a CPU spends most of its time in it."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from longctx.shapes import Float, Tensor

_FEW = 4  # rows up to which the batched product is faster, on one thread and on two


def linear(
    x: Float[Tensor, "*rows n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*rows m"]:
    """Return the result of F.linear; faster for few float32 rows on a CPU, if no gradients are needed.

    PyTorch multiplies a single row on one thread, and reads the weight at half of the rate that one core reaches.  A
    batched product of the weight's two halves with the transposed rows has neither limit.
    """
    rows, (m, n) = x.shape[:-1].numel(), weight.shape
    fast = 0 < rows <= _FEW and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    # The first layer's x is a transposed view.  PyTorch would multiply it row by row, and copy a bfloat16 weight for
    # each row.
    flat = x.reshape(rows, n)
    if not fast or not m or m % 2:
        return F.linear(flat, weight, bias).view(*x.shape[:-1], m)
    parts = torch.bmm(weight.unflatten(0, (2, -1)), flat.T.expand(2, n, rows))
    out = parts.flatten(0, 1).T.contiguous().view(*x.shape[:-1], m)
    return out if bias is None else out + bias


def speed_up(layer: ColumnParallelLinear) -> None:
    """Make ``layer`` compute its product with `linear`, except if gradients are on or under sequence parallelism."""
    stock = layer._forward_impl

    def forward(*, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:  # noqa: A002
        if torch.is_grad_enabled() or options["sequence_parallel"]:
            out: Tensor = stock(input=input, weight=weight, bias=bias, **options)
            return out
        return linear(input, weight, bias)

    layer._forward_impl = forward
