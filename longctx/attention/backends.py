"""The block kernels by name, and which of them a device takes."""

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel, reference

KERNELS = {"reference": reference, "flash_cpu": flash_cpu}


def kernel_for(asked: str, device: str) -> Kernel:
    """The kernel called ``asked``, or with ``auto`` the fastest for ``device`` (cpu, cuda).

    Raises ValueError where none has been tested exact.
    """
    if device != "cpu" and asked != "reference":
        raise ValueError(
            f"context.kernel={asked}: no fast kernel has been tested on {device} yet; "
            "use context.kernel=reference, or device=cpu"
        )
    return KERNELS["flash_cpu" if asked == "auto" else asked]
