"""What this machine's kernel and links do, measured by all ranks of a ring at once, for `longctx.cost`."""

import time
from collections.abc import Callable
from statistics import median

import torch

from longctx.attention.kernel import Kernel
from longctx.cost.hardware import Hardware, Link
from longctx.parallel.comm import Comm
from longctx.shapes import Tensor

_ROUNDS = 5
_WIDE, _FEW, _SHORT = 1024, 4, 16  # query rows of a wide block, of one that only reads keys; keys of a short one
_LONG = 8192  # keys that do not fit a core's cache
_SMALL, _LARGE = 2**10, 2**21  # bytes of a message
_SIDE = {"cpu": 1024, "cuda": 8192}  # of a matrix that keeps the device busy
_FASTEST = 1e12  # bytes/s: what noise may make of a link is no faster than memory
_FREE = Link(0.0, float("inf"))


@torch.inference_mode()
def probe(
    ring: Comm, kernel: Kernel, heads: tuple[int, int], width: int, dtype: torch.dtype, device: torch.device
) -> Hardware:
    """The constants of this ring for ``heads`` (query, KV) of ``width``; the same numbers on every rank.

    All ranks compute and send at once, as they will at work, and the slowest counts.  Takes a few seconds.
    """

    def seconds(work: Callable[[], object]) -> float:
        return _slowest(ring, work, device)

    def block(rows: int, keys: int) -> Callable[[], object]:
        q, k, v = (
            torch.randn(1, n, h, width, dtype=dtype, device=device)
            for n, h in ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]))
        )
        return lambda: kernel.forward(q, k, v, False)

    block_s = seconds(block(1, _SHORT))
    wide = block(_WIDE, _WIDE)
    wide_s = seconds(wide)
    read_s = seconds(block(_FEW, _LONG))
    read = 2 * _LONG * heads[1] * width * dtype.itemsize
    flops = 4 * _WIDE**2 * heads[0] * width / max(wide_s - block_s, 1e-9)
    kv_bytes_per_s = read / max(read_s - block_s, 1e-9)
    if ring.size == 1:
        return Hardware(flops, kv_bytes_per_s, block_s, _FREE, _FREE, overlap=1.0)
    hop = _link(*(seconds(_hop(ring, size, device)) for size in (_SMALL, _LARGE)))
    exchange = _link(*(seconds(_exchange(ring, size, device)) for size in (_SMALL, _LARGE)))
    # A message that takes as long as the block: what both together take tells how much is hidden.
    # No more than a few large ones, though: on a link too fast to measure that would be all memory.
    size = int(min(max(_SMALL, (wide_s - hop.latency_s) * hop.bytes_per_s), 8 * _LARGE))
    send = _hop(ring, size, device)
    alone_s, both_s = seconds(send), seconds(_hop(ring, size, device, meanwhile=wide))
    hidden = (alone_s + wide_s - both_s) / min(alone_s, wide_s)
    return Hardware(flops, kv_bytes_per_s, block_s, hop, exchange, min(1.0, max(0.0, hidden)))


@torch.inference_mode()
def gemm_flops(world: Comm, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a rank's large square matrix products while all ranks of ``world`` compute one: a peak that was seen.

    The same number on every rank, which all must ask.  A data sheet promises more.
    """
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _slowest(world, lambda: a @ b, device)


def _link(small_s: float, large_s: float) -> Link:
    """The line through two measured messages."""
    per_byte = max((large_s - small_s) / (_LARGE - _SMALL), 1 / _FASTEST)
    return Link(max(0.0, small_s - per_byte * _SMALL), 1 / per_byte)


def _hop(
    ring: Comm, size: int, device: torch.device, meanwhile: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    message = torch.zeros(size, dtype=torch.uint8, device=device)

    def send() -> object:
        coming = ring.shift(message, coming=[(size,)])
        meanwhile()
        return coming.wait()

    return send


def _exchange(ring: Comm, size: int, device: torch.device) -> Callable[[], object]:
    """An all-to-all in which each rank sends ``size`` bytes."""
    part = torch.zeros(max(1, size // (ring.size - 1)), dtype=torch.uint8, device=device)
    return lambda: ring.all_to_all([part] * ring.size, [tuple(part.shape)] * ring.size)


def _slowest(ring: Comm, work: Callable[[], object], device: torch.device) -> float:
    """Median over rounds of the slowest rank's seconds; the first round only warms up."""
    taken = []
    for _ in range(1 + _ROUNDS):
        _told(ring, 0.0, device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(float(_told(ring, time.perf_counter() - began, device).max()))
    return median(taken[1:])


def _told(ring: Comm, seconds: float, device: torch.device) -> Tensor:
    mine = torch.tensor([seconds], dtype=torch.float64, device=device)
    return torch.cat(ring.all_gather(mine, [(1,)] * ring.size))
