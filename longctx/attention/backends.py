"""Attention kernels by name, and the choice of one for a device and dtype."""

from collections.abc import Callable

import torch

from longctx.attention import flash_attn as flash_attn_package
from longctx.attention import triton_flash as triton_package
from longctx.attention.cudnn import cudnn
from longctx.attention.fastest import fastest_exact, tile_seconds
from longctx.attention.flash_attn import flash_attn
from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.flash_cuda import flash_cuda
from longctx.attention.kernel import Kernel, reference
from longctx.attention.triton_flash import in_interpreter, interpreted, triton_flash
from longctx.attention.verify import refuse_inexact

KERNELS = {kernel.name: kernel for kernel in (reference, flash_cpu, flash_cuda, cudnn, flash_attn, triton_flash)}


def kernel_for(name: str, device: str, dtype: str) -> Kernel:
    """Return the kernel called ``name``, without checking its results.

    ``auto`` is `flash_cpu` on a CPU.  On a GPU it is the first of the `candidates`, which is enough for checks of
    settings; `checked_kernel` takes the fastest one.  On a CPU, ``triton`` needs Triton's interpreter
    (`in_interpreter`).

    Raises ValueError if the kernel does not take the device or dtype, or if its package is not installed.
    """
    if name == "auto" and device != "cpu":
        return candidates(device, dtype)[0]
    kernel = KERNELS["flash_cpu" if name == "auto" else name]
    if kernel is triton_flash and device == "cpu" and in_interpreter():
        kernel = interpreted
    if not _takes(kernel, device, dtype):
        fitting = [
            other for other, candidate in KERNELS.items() if installed(other) and _takes(candidate, device, dtype)
        ]
        other_dtype = next((each for each in ("bfloat16", "float32") if _takes(kernel, device, each)), None)
        advice = f"model.dtype={other_dtype}, or " if other_dtype else ""
        advice += f"context.kernel={' or '.join(fitting)}"
        raise ValueError(f"context.kernel={name} does not take {dtype} on {device}; use {advice}")
    if not installed(name):
        other = "reference" if dtype == "float32" else "flash_cuda"
        raise ValueError(
            f"context.kernel={name} needs the package {name.replace('_', '-')}, which is not installed; "
            f"use context.kernel={other}"
        )
    return kernel


def installed(name: str) -> bool:
    """Return True if kernel ``name`` needs no package of its own, or if that package is installed."""
    return {"flash_attn": flash_attn_package.installed, "triton": triton_package.installed}.get(name, True)


def _takes(kernel: Kernel, device: str, dtype: str) -> bool:
    return device in kernel.devices and getattr(torch, dtype) in kernel.dtypes


def candidates(device: str, dtype: str) -> list[Kernel]:
    """Return the installed kernels that ``auto`` chooses among on a GPU.

    `reference` is left out: it keeps all scores of a tile in memory.  Raises ValueError unless ``dtype`` is bfloat16 or
    float16.
    """
    names = [name for name, kernel in KERNELS.items() if installed(name) and _takes(kernel, device, dtype)]
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"context.kernel=auto does not take {dtype} on {device}; use context.kernel=auto model.dtype=bfloat16 "
            f"(checked against float64 on this device before use), context.kernel={' or '.join(names)} or "
            "run.device=cpu"
        )
    return [KERNELS[name] for name in names if name != "reference"]


def checked_kernel(
    name: str,
    device: torch.device,
    dtype: str,
    head_dim: int,
    slowest: Callable[[list[float]], list[float]] = list,
) -> Kernel:
    """Return kernel ``name``, verified on ``device`` for heads of ``head_dim`` unless ``device`` is a CPU.

    On a GPU, ``auto`` is the fastest of the `candidates` that are exact there.  For this choice alone, ``slowest`` is
    called, once: it turns each candidate's seconds on this rank into the maximum over all ranks.  The default is for
    one rank.

    Raises ValueError as `kernel_for` does, and if the kernel is inexact on this device (`refuse_inexact`).
    """
    precision: torch.dtype = getattr(torch, dtype)
    if name == "auto" and device.type != "cpu":
        return fastest_exact(
            candidates(device.type, dtype),
            check=lambda kernel: refuse_inexact(kernel, device, precision, head_dim),
            seconds=lambda kernel: tile_seconds(kernel, device, precision, head_dim),
            slowest=slowest,
        )
    kernel = kernel_for(name, device.type, dtype)
    if device.type != "cpu":
        refuse_inexact(kernel, device, precision, head_dim)
    return kernel
