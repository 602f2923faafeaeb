"""Products of rows with a weight: on a CPU, few rows and float32 have faster ways than PyTorch's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from longctx.onednn import Products, is_faster, multiplies, multiply
from longctx.shapes import Float, Tensor

_FEW = 4  # rows up to which the batched product is faster, on one thread and on two


def linear(
    x: Float[Tensor, "*rows n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*rows m"]:
    """Return the result of F.linear; on a CPU, faster for few float32 rows, if no gradients are needed.

    PyTorch multiplies a single row on one thread, and reads the weight at half of the rate that one core reaches.  A
    batched product of the weight's two halves with the transposed rows has neither limit.  More rows are multiplied by
    oneDNN where it is faster (`longctx.onednn`).
    """
    rows, (m, n) = x.shape[:-1].numel(), weight.shape
    gradients = torch.is_grad_enabled()
    few = 0 < rows <= _FEW and x.dtype == torch.float32 and x.device.type == "cpu" and not gradients
    # The first layer's x is a transposed view.  PyTorch would multiply it row by row, and copy a bfloat16 weight for
    # each row.
    flat = x.reshape(rows, n)
    if not few and not gradients and multiplies(flat, weight.T):
        return multiply(flat, weight.T, bias).view(*x.shape[:-1], m)
    if not few or not m or m % 2:
        return F.linear(flat, weight, bias).view(*x.shape[:-1], m)
    parts = torch.bmm(weight.unflatten(0, (2, -1)), flat.T.expand(2, n, rows))
    out = parts.flatten(0, 1).T.contiguous().view(*x.shape[:-1], m)
    return out if bias is None else out + bias


def train_by_onednn() -> None:
    """Make the linear layers of megatron-core, forward and backward, use oneDNN where it is faster, in this process.

    megatron-core's source is not patched; its two autograd functions are replaced by subclasses.
    """
    for name in ("LinearWithGradAccumulationAndAsyncCommunication", "LinearWithFrozenWeight"):
        function = getattr(megatron_layers, name)
        if is_faster() and not hasattr(function, "stock"):
            setattr(megatron_layers, name, _by_onednn(function))


def _by_onednn(stock: Any) -> type:
    """Return the autograd function ``stock`` with its products by oneDNN where it is faster."""

    def forward(ctx: Any, *args: Any) -> Any:
        with Products():
            return stock.forward(ctx, *args)

    def backward(ctx: Any, *gradients: Any) -> Any:
        with Products():
            return stock.backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "stock": stock}
    return type(stock.__name__, (stock,), methods)


def speed_up(layer: ColumnParallelLinear) -> None:
    """Make ``layer`` compute its product with `linear`, except if gradients are on or under sequence parallelism."""
    stock = layer._forward_impl

    def forward(*, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:  # noqa: A002
        if torch.is_grad_enabled() or options["sequence_parallel"]:
            out: Tensor = stock(input=input, weight=weight, bias=bias, **options)
            return out
        return linear(input, weight, bias)

    layer._forward_impl = forward
