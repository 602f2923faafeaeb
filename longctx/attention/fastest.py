"""The fastest kernel of a GPU among those that are exact on it."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from longctx.attention.kernel import Kernel

_ROWS, _HEADS, _KV_HEADS, _ROUNDS = 2048, 8, 2, 3


def fastest_exact(
    candidates: Sequence[Kernel],
    check: Callable[[Kernel], None],
    seconds: Callable[[Kernel], float],
    slowest: Callable[[list[float]], list[float]],
) -> Kernel:
    """Return the fastest of the ``candidates`` that ``check`` accepts on every rank, the same one on all ranks.

    ``check`` raises ValueError for an inexact kernel.  A library may raise any error for a device that it does not
    take, and Triton if it cannot compile.  The kernel then counts as infinitely slow.  ``slowest`` turns each
    candidate's seconds on this rank into the maximum over all ranks.

    Raises ValueError, with the reason for each kernel, if none is left.
    """
    reasons, measured = [], []
    for kernel in candidates:
        try:
            check(kernel)
            measured.append(seconds(kernel))
        except Exception as error:  # this rank must go on to `slowest`, where the others wait
            reasons.append(f"{kernel.name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            measured.append(math.inf)
    everywhere = slowest(measured)
    best = min(range(len(candidates)), key=everywhere.__getitem__)
    if everywhere[best] == math.inf:
        why = "; ".join(reasons) or "each one failed on another rank"
        raise ValueError(f"context.kernel=auto: no kernel is exact on all GPUs ({why}); use context.kernel=reference")
    return candidates[best]


def tile_seconds(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, rows: int = _ROWS) -> float:
    """Return the median seconds of one forward and backward of a causal tile of ``rows`` rows, after a warm-up."""
    q, k, v, dout = (
        torch.randn(1, rows, heads, head_dim, device=device, dtype=dtype)
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)
    )
    rounds = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        part = kernel.forward(q, k, v, True)
        kernel.backward(dout, q, k, v, part.out, part.lse, True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter() - began)
    return median(rounds[1:])
