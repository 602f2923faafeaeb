"""Products of float32 matrices by oneDNN, on CPUs on which it is much faster than MKL.

PyTorch multiplies float32 matrices by MKL, which has AVX-512 code for Intel's CPUs only; on others it uses AVX2.
oneDNN, which PyTorch contains as well, uses AVX-512 on all of them: on an AMD EPYC (Zen 5), a core makes 240 GFLOP/s
instead of 105.  The choice is made by the CPU and by the size of a product, never by a measurement: equal products give
equal bits in every run on a machine.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from longctx.shapes import Float, Tensor

_LEAST_WORK = 2**20  # multiplications; below, a call of oneDNN takes longer than the product
_LEAST_INNER = 32  # numbers of rows and columns of the second matrix; narrower ones gain nothing


@cache
def is_faster() -> bool:
    """Return True on a CPU with AVX-512 that is not Intel's, if PyTorch was built with both libraries.

    It is False if oneDNN's results are not those of float32.
    """
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    suits = torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() != "GenuineIntel"
    return built and suits and _is_exact()


def _vendor() -> str:
    """Return the CPU's vendor as Linux names it; "GenuineIntel" if unknown."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^vendor_id\s*:\s*(\S+)", info.read_text() if info.is_file() else "", re.MULTILINE)
    return named[1] if named else "GenuineIntel"


@torch.inference_mode()
def _is_exact() -> bool:
    """Return True if oneDNN multiplies in float32: its environment variables can make it round to bfloat16."""
    x = torch.arange(64 * 64, dtype=torch.float64).view(64, 64).sin()
    exact, product = x @ x.T, multiply(x.float(), x.float().T)
    return bool((product - exact).norm() < 1e-5 * exact.norm())


def multiplies(a: Float[Tensor, "*rows k"], b: Float[Tensor, "*k n"]) -> bool:
    """Return True if `multiply` is faster than MKL for ``a`` @ ``b``; both must then be free of gradients."""
    is_float32 = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    is_large = a.numel() * b.shape[-1] >= _LEAST_WORK and min(b.shape) >= _LEAST_INNER
    return is_float32 and is_large and b.ndim == 2 and _is_dense(b) and is_faster()


def _is_dense(x: Float[Tensor, "m n"]) -> bool:
    """Return True if ``x`` or its transpose is contiguous; oneDNN takes a thousand times as long for other views."""
    return x.is_contiguous() or x.t().is_contiguous()


def multiply(
    a: Float[Tensor, "*rows k"], b: Float[Tensor, "k n"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*rows n"]:
    """Return ``a`` @ ``b`` + ``bias`` by oneDNN, without a gradient; ``b`` or its transpose must be contiguous."""
    is_usable = a.ndim == 2 and _is_dense(a)
    out: Tensor = _product(a if is_usable else a.contiguous(), b.t(), bias)
    return out


def _product(x: Float[Tensor, "*rows k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # an op that some builds lack


class Products(TorchFunctionMode):
    """Inside this ``with`` block, torch.matmul uses oneDNN where it is faster.  Gradients must be off."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul) and not kwargs and multiplies(*args):
            return multiply(*args)
        return func(*args, **(kwargs or {}))
