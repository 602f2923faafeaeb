"""Calls, bytes and seconds of the all-reduces that megatron-core's layers make in a block of code."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Tally:
    """All-reduces of this rank: calls, bytes of their tensors, and seconds including the wait for other ranks."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@contextmanager
def count_all_reduces() -> Iterator[Tally]:
    """Count this rank's all-reduces while the block runs.

    For gloo, whose all-reduces return when they are done; others would return before their seconds have passed.
    """
    tally, real = Tally(), dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = real(tensor, *args, **kwargs)
        tally.calls += 1
        tally.bytes += tensor.nbytes
        tally.seconds += time.perf_counter() - began
        return result

    dist.all_reduce = counting
    try:
        yield tally
    finally:
        dist.all_reduce = real


def time_all_reduce(group: dist.ProcessGroup, size: int, rounds: int, device: torch.device) -> float:
    """Return the seconds of a float32 all-reduce of ``size`` bytes over ``group``: the least of ``rounds``.

    For gloo, whose all-reduces return when they are done; a GPU is not synchronized.
    """
    x = torch.zeros(max(1, size // 4), device=device)
    seconds = []
    for _ in range(rounds):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(x, group=group)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
