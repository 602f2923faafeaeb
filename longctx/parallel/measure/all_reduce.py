"""Calls, bytes and seconds of the reductions that a model's layers make in a block of code."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.cost.reduction import message_bytes
from longctx.parallel import quantised
from longctx.parallel.comm import Comm


@dataclass
class Tally:
    """Reductions of this rank: calls, bytes of their tensors, and seconds including the wait for other ranks.

    For a rounded reduction, the bytes are those of the rounded tensor.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@contextmanager
def count_all_reduces() -> Iterator[Tally]:
    """Count this rank's all-reduces and rounded sums (`quantised`) while the block runs.

    It replaces `dist.all_reduce` and `quantised.two_step_sum` during the block; calls by names that were imported from
    these modules do not count.  Use it with gloo only, whose all-reduces return when they are done.  Those of other
    backends return earlier, so their seconds would be too few.
    """
    tally, all_reduce, rounded = Tally(), dist.all_reduce, quantised.two_step_sum

    def counting(reduce: Callable[..., Any], size: int, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = reduce(*args, **kwargs)
        tally.calls += 1
        tally.bytes += size
        tally.seconds += time.perf_counter() - began
        return result

    def counting_rounded(comm: Comm, x: torch.Tensor, dtype: str, group: int = 64) -> torch.Tensor:
        size = message_bytes(x.shape[:-1].numel(), x.shape[-1], dtype, group)
        result: torch.Tensor = counting(rounded, size, comm, x, dtype, group)
        return result

    dist.all_reduce = lambda tensor, *args, **kwargs: counting(all_reduce, tensor.nbytes, tensor, *args, **kwargs)
    quantised.two_step_sum = counting_rounded
    try:
        yield tally
    finally:
        dist.all_reduce, quantised.two_step_sum = all_reduce, rounded


def time_all_reduce(group: dist.ProcessGroup, size: int, rounds: int, device: torch.device) -> float:
    """Return the seconds of a float32 all-reduce of ``size`` bytes over ``group``: the least of ``rounds``.

    Every rank of ``group`` calls this and returns its own time.  Use it with gloo only, whose all-reduces return when
    they are done.  The clock does not wait for a GPU.
    """
    x = torch.zeros(max(1, size // 4), device=device)
    seconds = []
    for _ in range(rounds):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(x, group=group)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
