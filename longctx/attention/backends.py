"""The block kernels by name, and which of them a device takes."""

import torch

from longctx.attention import flash_attn as package
from longctx.attention.cudnn import cudnn
from longctx.attention.flash_attn import flash_attn
from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.flash_cuda import flash_cuda
from longctx.attention.kernel import Kernel, reference
from longctx.attention.verify import refuse_inexact

KERNELS = {kernel.name: kernel for kernel in (reference, flash_cpu, flash_cuda, cudnn, flash_attn)}


def kernel_for(asked: str, device: str, dtype: str) -> Kernel:
    """The kernel called ``asked``, or with ``auto`` the fastest for ``device`` (cpu, cuda) and ``dtype``.

    Raises ValueError where it does not take them, and for ``auto`` where none has been run yet.
    """
    if asked == "auto" and device != "cpu":
        raise ValueError(
            f"context.kernel=auto: no fast kernel has been run on {device} yet; name one, context.kernel=flash_cuda "
            "(it is checked against float64 on this device before it is used) or reference, or use device=cpu"
        )
    kernel = KERNELS["flash_cpu" if asked == "auto" else asked]
    if device not in kernel.devices or getattr(torch, dtype) not in kernel.dtypes:
        fit = [name for name, one in KERNELS.items() if device in one.devices and getattr(torch, dtype) in one.dtypes]
        raise ValueError(f"context.kernel={asked} does not take {dtype} on {device}: use {' or '.join(fit)}")
    if kernel is flash_attn and not package.installed:
        raise ValueError("context.kernel=flash_attn needs the flash-attn package: use context.kernel=flash_cuda")
    return kernel


def checked_kernel(asked: str, device: torch.device, dtype: str, width: int) -> Kernel:
    """`kernel_for`, which on anything but a CPU has shown on this very ``device`` that it is exact for this width."""
    kernel = kernel_for(asked, device.type, dtype)
    if device.type != "cpu":
        refuse_inexact(kernel, device, getattr(torch, dtype), width)
    return kernel
