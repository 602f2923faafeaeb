"""What the all-reduces of a block of code cost, calls, bytes and seconds: those of megatron-core's layers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Tally:
    """Of this rank: all-reduces, bytes of their tensors, and seconds in them (waiting for other ranks included)."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@contextmanager
def tallied() -> Iterator[Tally]:
    """A tally of the all-reduces that are made while the block runs; of gloo's, which return when they are done."""
    tally, real = Tally(), dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        done = real(tensor, *args, **kwargs)
        tally.calls += 1
        tally.bytes += tensor.nbytes
        tally.seconds += time.perf_counter() - began
        return done

    dist.all_reduce = counting
    try:
        yield tally
    finally:
        dist.all_reduce = real


def seconds_of_one(group: dist.ProcessGroup, size: int, times: int, device: torch.device) -> float:
    """Of an all-reduce of ``size`` bytes over ``group``, the least of ``times``."""
    x = torch.zeros(max(1, size // 4), device=device)
    taken = []
    for _ in range(times):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(x, group=group)
        taken.append(time.perf_counter() - began)
    return min(taken)
