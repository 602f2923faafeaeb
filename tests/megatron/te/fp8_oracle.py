"""Products of numbers rounded to 8 bits, in float64, for local layers: the oracle of `model.fp8`.

It is written from the recipes' description in Transformer Engine's documentation, and shares no code with the stand-in.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from longctx.megatron.modules import BiasedColumnParallelLinear, BiasedRowParallelLinear
from longctx.megatron.sharded import OutputProjection, QKVProjection, UpProjection

LAYERS = (QKVProjection, UpProjection, OutputProjection, BiasedColumnParallelLinear, BiasedRowParallelLinear)
E4M3, E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)


def round_products(net: nn.Module, fp8: str) -> None:
    """Make the linear layers of ``net``'s blocks round the inputs of their products."""
    for module in net.decoder.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            assert type(module) in LAYERS, f"{type(module).__name__} adds something to the product"
            module.forward = partial(_forward, module, fp8)


def _forward(module: Any, fp8: str, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    sequence_parallel, group = module.config.sequence_parallel, module.tp_group
    is_column = isinstance(module, ColumnParallelLinear)
    if is_column:
        x = (gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region)(
            x, group=group
        )
    out = _Product.apply(x, module.weight, fp8)
    if not is_column:
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        out = reduce(out, group=group)
    if module.bias is None or module.skip_bias_add:
        return out, None if module.bias is None else module.bias + 0
    return out + module.bias, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fp8: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        return _values(x, fp8) @ _weight(weight, fp8).T

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = _values(dout, ctx.fp8, backward=True) @ _weight(weight, ctx.fp8)
        # The product for the weight sums over rows, so that blocks run along the rows.
        columns, of_out = (t.reshape(-1, t.shape[-1]).T for t in (x, dout))
        dw = _values(of_out, ctx.fp8, backward=True) @ _values(columns, ctx.fp8).T
        return dx, dw, None


def _values(x: Tensor, fp8: str, *, backward: bool = False) -> Tensor:
    """Activations, or gradients: one scale a tensor, or one for 128 values of the last dim."""
    if fp8 == "current":
        return _scaled(x, x.abs().max(), E5M2 if backward else E4M3)
    parts = [_scaled(part, part.abs().amax(-1, keepdim=True), E4M3, power_of_2=True) for part in x.split(128, -1)]
    return torch.cat(parts, -1)


def _weight(weight: Tensor, fp8: str) -> Tensor:
    """One scale a tensor, or one for each square of 128 x 128."""
    if fp8 == "current":
        return _scaled(weight, weight.abs().max(), E4M3)
    bands = [
        [_scaled(s, s.abs().max(), E4M3, power_of_2=True) for s in band.split(128, 1)] for band in weight.split(128)
    ]
    return torch.cat([torch.cat(band, 1) for band in bands])


def _scaled(x: Tensor, largest: Tensor, kind: tuple[torch.dtype, float], *, power_of_2: bool = False) -> Tensor:
    dtype, limit = kind
    scale = limit / largest.float()
    if power_of_2:
        scale = 2 ** scale.log2().floor()
    scale = scale.where(largest > 0, torch.ones(()))
    rounded = (x.float() * scale).clamp(-limit, limit).to(dtype)
    return rounded.to(x.dtype) * (1 / scale).to(x.dtype)
