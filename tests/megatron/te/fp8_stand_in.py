"""FP8 of Transformer Engine's C++ extension on CPU: values are rounded to FP8 exactly as its recipes say.

Which tensors are rounded, by which recipe, and in which of the two directions is Transformer Engine's own code.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # values that share a scale in block scaling
_ATTRIBUTES = {"data_transpose": "_transpose", "fp8_scale_inv": "_scale_inv"}  # others: "_" and the argument's name
_FORMATS = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}


def add_functions(extension: Any) -> None:
    """Add the functions to the ``extension``, before Transformer Engine is imported."""
    for function in (quantize, bgrad_quantize, create_empty_quantized_tensor, swap_first_dims, fp8_transpose):
        setattr(extension, function.__name__, function)


def claim_support() -> None:
    """Make Transformer Engine take this machine for one with GPUs that multiply in 8 bits."""
    from transformer_engine.pytorch import distributed, quantization

    _coalesce_on_gloo()
    # Checkpoints of activations save and restore the state of the GPU's generator.
    distributed._get_cuda_rng_state, distributed._set_cuda_rng_state = lambda **_: None, lambda *_, **__: None
    for check in ("check_fp8_support", "check_fp8_block_scaling_support"):
        setattr(quantization, check, lambda: (True, ""))
    quantization.check_mxfp8_support = lambda: (False, "")
    quantization.get_device_compute_capability = lambda: (9, 0)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # Hopper, whose products need both directions


def _coalesce_on_gloo() -> None:
    """Replace coalesced collectives, which gloo lacks, by single ones, which have ended when their calls return."""
    original = dist._coalescing_manager

    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        single = nullcontext(SimpleNamespace(wait=lambda: None))
        return single if device else original(group, async_ops=async_ops)

    dist._coalescing_manager = manager


def quantize(x: Tensor, quantizer: Any, out: Any = None, noop: None = None) -> Any:
    """Return ``x`` rounded as ``quantizer`` says, in the class that the extension would return."""
    assert noop is None and x.is_contiguous() and x.shape[-1] % 16 == 0
    fields = _block_fields(x, quantizer) if hasattr(quantizer, "block_len") else _tensor_fields(x, quantizer)
    if out is not None:
        for name, value in fields.items():
            if value is not None:
                getattr(out, _ATTRIBUTES.get(name, f"_{name}")).copy_(value)
        return out
    return _class_of(quantizer)(**fields, **_constants(x, quantizer))


def bgrad_quantize(x: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Return the gradient of a bias, and ``x`` rounded."""
    return x.reshape(-1, x.shape[-1]).sum(0), quantize(x, quantizer)


def create_empty_quantized_tensor(quantizer: Any, shape: list[int], dtype: torch.dtype, *_: Any) -> Any:
    return quantize(torch.zeros(shape, dtype=dtype), quantizer)


def swap_first_dims(x: Tensor, out: Tensor) -> None:
    out.copy_(x.transpose(0, 1))


def fp8_transpose(data: Tensor, _: Any, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def is_rounded(x: Any) -> bool:
    return hasattr(x, "_quantizer")


def values_of(x: Any, columnwise: bool) -> Tensor:
    """Return the rounded values of ``x`` in float64, from the data of one direction; plain tensors stay."""
    if not is_rounded(x):
        return x
    dtype = _FORMATS[x._fp8_dtype.name]
    if hasattr(x, "_scale_inv"):
        data = x._transpose if columnwise else x._data
        values = data.view(dtype).double() * x._scale_inv.double()
    else:
        data, scales = (
            (x._columnwise_data, x._columnwise_scale_inv) if columnwise else (x._rowwise_data, x._rowwise_scale_inv)
        )
        matrix = data.view(len(data), -1) if columnwise else data.view(-1, data.shape[-1])
        values = data.view(dtype).double() * _scale_of_each_value(matrix, scales, x._is_2D_scaled).view(data.shape)
    return values.movedim(0, -1) if columnwise else values


def _largest(quantizer: Any) -> float:
    return torch.finfo(_FORMATS[quantizer.dtype.name]).max


def _scales(largest: Tensor, quantizer: Any) -> Tensor:
    """Return factors that take ``largest`` to the format's largest value; 1 where there is nothing to scale."""
    scales = _largest(quantizer) / largest.float().clamp(min=quantizer.amax_epsilon)
    if quantizer.force_pow_2_scales:
        scales = torch.ldexp(torch.ones_like(scales), torch.frexp(scales).exponent - 1)
    return torch.where((largest == 0) | ~scales.isfinite(), 1, scales)


def _rounded(x: Tensor, scales: Tensor, quantizer: Any) -> Tensor:
    limit = _largest(quantizer)
    return (x.float() * scales).clamp(-limit, limit).to(_FORMATS[quantizer.dtype.name]).view(torch.uint8)


def _tensor_fields(x: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    """Current scaling: one scale for a tensor, from its largest value over all ranks of a group."""
    largest = x.abs().amax().float()
    if quantizer.with_amax_reduction:
        dist.all_reduce(largest, dist.ReduceOp.MAX, quantizer.amax_reduction_group)
    scale = _scales(largest, quantizer)
    data = _rounded(x, scale, quantizer)
    return {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": fp8_transpose(data, None) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": (1 / scale).reshape(1),
    }


def _block_fields(x: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    """Block scaling: one scale for 128 values of a row, or for a square of them; each direction has its own."""
    rows = x.reshape(-1, x.shape[-1])
    row, column = (None, None), (None, None)
    if quantizer.rowwise_usage:
        data, scales = _rounded_in_blocks(rows, quantizer)
        row = data.view(x.shape), scales
    if quantizer.columnwise_usage:
        data, scales = _rounded_in_blocks(rows.T.contiguous(), quantizer)
        column = data.view(x.shape[-1], *x.shape[:-1]), scales
    names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    return dict(zip(names, (*row, *column), strict=True))


def _rounded_in_blocks(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Round ``x`` [m k]; return it and the scales' inverses, [m/128 k/128] or [k/128 m], the last dim padded to 4."""
    square = quantizer.block_scaling_dim == 2
    height = BLOCK if square else 1
    m, k = x.shape
    padded = F.pad(x, (0, -k % BLOCK, 0, -m % height))
    tiles = padded.reshape(-1, height, padded.shape[1] // BLOCK, BLOCK)
    scales = _scales(tiles.abs().amax((1, 3)), quantizer)  # [m/height k/128]
    data = _rounded(tiles, scales[:, None, :, None], quantizer).view(padded.shape)[:m, :k].contiguous()
    stored = 1 / (scales if square else scales.T)
    return data, F.pad(stored, (0, -stored.shape[1] % 4)).contiguous()


def _scale_of_each_value(data: Tensor, stored: Tensor, square: bool) -> Tensor:
    rows, k = data.shape
    if square:
        each = stored.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    else:
        each = stored.T.repeat_interleave(BLOCK, 1)
    return each[:rows, :k].double()


def _class_of(quantizer: Any) -> type:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor

    if hasattr(quantizer, "block_len"):
        module, name = float8_blockwise_tensor, "Float8BlockwiseQTensor"
    else:
        module, name = float8_tensor, "Float8Tensor"
    return getattr(module, f"{name}Storage" if quantizer.internal else name)


def _constants(x: Tensor, quantizer: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if hasattr(quantizer, "block_len"):
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    if quantizer.internal:
        return {**fields, "fake_dtype": x.dtype}
    return {**fields, "shape": x.shape, "dtype": x.dtype, "device": x.device}
