"""Measure the attention kernel and the links of a machine, on all ranks of a ring at once, for `longctx.cost`."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from longctx.attention.kernel import Kernel
from longctx.cost.decode import DecodeHardware
from longctx.cost.hardware import Hardware, LayerRates, Link, TrainRates
from longctx.onednn import Products
from longctx.parallel.comm import Comm
from longctx.shapes import Tensor

_ROUNDS = 5
_IN_TURN, _MOST_S = 20, 0.05  # most messages of a round, each after a product, and about their seconds
_PRODUCT = 256  # rows and columns of this product's matrices
_WIDE = 1024  # query rows and keys of a compute-bound block
_FEW = 4  # query rows of a block whose time goes into reading keys
_SHORT = 16  # keys of a block that costs no more than its launch
_LONG = 8192  # keys that do not fit a core's cache
_ROWS = 512  # rows for which a layer's GEMMs are compute-bound
_SOME = 128  # fewer rows, for which they are compute-bound, too
_SMALL, _LARGE = 2**10, 2**21  # bytes of a message
_SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of a matrix that keeps the device busy
_FASTEST = 1e12  # bytes/s, the speed of memory: measurement noise must not make a link faster
_FREE = Link(0.0, float("inf"))


@torch.inference_mode()
def probe(
    ring: Comm, kernel: Kernel, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> Hardware:
    """Measure the kernel and the links of this ring as a `Hardware`; every rank returns the same numbers.

    ``heads`` are a rank's (query, KV) heads.  All ranks compute and send at the same time, as in a real run, and the
    slowest rank counts.  The links of a ring of one rank cost nothing.  Fields of `Hardware` with defaults are not
    measured.  Takes a few seconds.
    """

    def seconds(work: Callable[[], object]) -> float:
        return _slowest(ring, work, device)

    def block(rows: int, keys: int) -> Callable[[], object]:
        q, k, v = _random(rows, keys, heads, head_dim, dtype, device)
        return lambda: kernel.forward(q, k, v, False)

    # 1. The kernel: launch cost, FLOP/s and bytes of keys and values per second.
    block_s = seconds(block(1, _SHORT))
    wide = block(_WIDE, _WIDE)
    wide_s = seconds(wide)
    read_s = seconds(block(_FEW, _LONG))
    read = 2 * _LONG * heads[1] * head_dim * dtype.itemsize
    flops = 4 * _WIDE**2 * heads[0] * head_dim / max(wide_s - block_s, 1e-9)
    kv_bytes_per_s = read / max(read_s - block_s, 1e-9)
    if ring.size == 1:
        return Hardware(flops, kv_bytes_per_s, block_s, _FREE, _FREE, overlap=1.0)
    # 2. The links: a hop of the ring, and an all-to-all.
    hop = _link(*(added_seconds(ring, _hop(ring, size, device), device) for size in (_SMALL, _LARGE)))
    exchange = _link(*(added_seconds(ring, _exchange(ring, size, device), device) for size in (_SMALL, _LARGE)))
    # 3. Overlap: send a message that takes as long as the block, alone and during the block.  On a link that is too
    # fast to measure, that message would fill the memory, so its size is limited.
    alone = _link(*(seconds(_hop(ring, size, device)) for size in (_SMALL, _LARGE)))
    size = int(min(max(_SMALL, (wide_s - alone.latency_s) * alone.bytes_per_s), 8 * _LARGE))
    send = _hop(ring, size, device)
    alone_s, both_s = seconds(send), seconds(_hop(ring, size, device, meanwhile=wide))
    hidden = (alone_s + wide_s - both_s) / min(alone_s, wide_s)
    return Hardware(flops, kv_bytes_per_s, block_s, hop, exchange, min(1.0, max(0.0, hidden)))


@torch.inference_mode()
def probe_tiles(
    ring: Comm, kernel: Kernel, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Measure `Hardware`'s ``backward`` and ``causal`` from a tile of `_ROWS` rows, on all ranks at once.

    The arguments are those of `probe`.  Every rank returns the same two numbers.
    """
    q, k, v = _random(_ROWS, _ROWS, heads, head_dim, dtype, device)
    whole = kernel.forward(q, k, v, False)
    dout, out = torch.ones_like(q), whole.out.to(dtype)
    full_s, causal_s = (_slowest(ring, partial(kernel.forward, q, k, v, causal), device) for causal in (False, True))
    backward_s = _slowest(ring, lambda: kernel.backward(dout, q, k, v, out, whole.lse, False), device)
    return backward_s / full_s, 2 * causal_s / full_s


def _random(
    rows: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return random queries, keys and values."""
    sizes = ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]))
    return [torch.randn(1, n, h, head_dim, dtype=dtype, device=device) for n, h in sizes]


@torch.inference_mode()
def gemm_flops(world: Comm, dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of a large square GEMM on this rank while all ranks of ``world`` compute one.

    All ranks must call this, and all return the slowest rank's number.  It is a measured peak, below the data sheet's.
    """
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    with Products():
        return 2 * side**3 / _slowest(world, lambda: torch.matmul(a, b), device)


@torch.inference_mode()
def probe_decode(
    world: Comm, dtype: torch.dtype, device: torch.device, product: Callable[[Tensor, Tensor], Tensor]
) -> DecodeHardware:
    """Measure the rates of decoding on all ranks of ``world`` at once; every rank returns the slowest rank's rates.

    ``product(x, weight)`` is the matrix product that decoding uses, as F.linear.
    """
    side = 4 * _SIDE[device.type]
    weight = torch.ones(side, side, dtype=dtype, device=device)  # larger than a core's cache
    row, rows = (torch.ones(n, side, dtype=dtype, device=device) for n in (1, 64))
    read_s, compute_s = (_slowest(world, partial(product, x, weight), device) for x in (row, rows))

    def gather(size: int) -> Callable[[], object]:
        part = torch.ones(max(1, size // max(1, world.size - 1)), dtype=torch.uint8, device=device)
        return lambda: world.all_gather(part, [tuple(part.shape)] * world.size)

    exchange = _link(*(added_seconds(world, gather(size), device) for size in (_SMALL, _LARGE)))
    return DecodeHardware(weight.nbytes / read_s, 2 * 64 * side**2 / compute_s, exchange)


@torch.inference_mode()
def probe_layer(
    world: Comm,
    layer: Callable[[int], object],
    weights: float,
    dtype: torch.dtype,
    device: torch.device,
    product: Callable[[Tensor, Tensor], Tensor],
) -> LayerRates:
    """Measure the rates of one rank's layers without attention, while all ranks of ``world`` compute at once.

    ``layer(rows)`` computes a layer of ``weights`` weights, without attention, for that many rows.  The model is: a
    layer takes the time to read its weights, plus the time of its GEMMs, plus a fixed overhead ``layer_s``.  The last
    two follow from its seconds for one row, whose GEMMs count as free, and for many rows.  The rate of reading weights
    and the link are those of `probe_decode` with ``product``.  Every rank returns the same rates.
    """
    decode = probe_decode(world, dtype, device, product)
    one_s, many_s = (_slowest(world, partial(layer, rows), device) for rows in (1, _ROWS))
    overhead_s = max(0.0, one_s - weights * dtype.itemsize / decode.weight_bytes_per_s)
    gemm_flops = 2 * weights * (_ROWS - 1) / max(many_s - one_s, 1e-9)
    return LayerRates(gemm_flops, decode.weight_bytes_per_s, overhead_s, decode.exchange)


def probe_training(
    world: Comm,
    step: Callable[[int], object],
    update: Callable[[], object],
    loss: Callable[[int], tuple[float, float]],
    weights: float,
    rates: LayerRates,
    overhead_s: float,
    device: torch.device,
) -> TrainRates:
    """Measure `TrainRates` while all ranks of ``world`` compute at once; every rank returns the same ones.

    ``step(rows)`` computes the forward and backward of layers with ``weights`` weights, without attention, for that
    many rows; ``update()`` updates these weights.  ``loss(rows)`` computes the loss of that many rows with its
    gradients, and returns the numbers of its logits and of its GEMMs' FLOPs.  ``rates`` are those of the same layers in
    inference, and ``overhead_s`` is all layers' overhead of a step, which does not count in ``gradient_s``.
    """
    some_s, many_s = (_slowest(world, partial(step, rows), device) for rows in (_SOME, _ROWS))
    row_s, forward_s = (many_s - some_s) / (_ROWS - _SOME), 2 * weights / rates.gemm_flops
    gradient_s = max(0.0, some_s - _SOME * row_s - overhead_s) / weights
    logits, flops = loss(_ROWS)
    loss_s = max(0.0, _slowest(world, partial(loss, _ROWS), device) - flops / rates.gemm_flops) / logits
    return TrainRates(max(row_s / forward_s - 1, 1e-9), gradient_s, _slowest(world, update, device) / weights, loss_s)


def _link(small_s: float, large_s: float) -> Link:
    """Fit a `Link` (latency and bytes/s) to the seconds of a message of `_SMALL` bytes and of one of `_LARGE` bytes."""
    per_byte = max((large_s - small_s) / (_LARGE - _SMALL), 1 / _FASTEST)
    return Link(max(0.0, small_s - per_byte * _SMALL), 1 / per_byte)


def _hop(
    ring: Comm, size: int, device: torch.device, meanwhile: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """Return a function that sends ``size`` bytes one hop, and calls ``meanwhile`` while they are in flight."""
    message = torch.ones(size, dtype=torch.uint8, device=device)

    def send() -> object:
        pending = ring.shift(message, shapes=[(size,)])
        meanwhile()
        return pending.wait()

    return send


def _exchange(ring: Comm, size: int, device: torch.device) -> Callable[[], object]:
    """Return a function that runs an all-to-all in which each rank sends ``size`` bytes in total."""
    part = torch.ones(max(1, size // (ring.size - 1)), dtype=torch.uint8, device=device)
    return lambda: ring.all_to_all([part] * ring.size, [tuple(part.shape)] * ring.size)


def added_seconds(ring: Comm, send: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``send`` adds to a product computed before it, of the slowest rank.

    In a run, messages follow computation: ranks are not ready at the same moment, a waiting rank sleeps, and the
    caches hold other data.  A message then takes two to four times as long as in a loop of messages.
    """
    a = torch.randn(_PRODUCT, _PRODUCT, device=device)
    in_turn = min(_IN_TURN, max(1, int(_MOST_S / _slowest(ring, send, device))))  # the same on all ranks

    def products(then: Callable[[], object]) -> None:
        for _ in range(in_turn):
            torch.matmul(a, a)
            then()

    alone_s, both_s = (_slowest(ring, partial(products, then), device) for then in (lambda: None, send))
    return max((both_s - alone_s) / in_turn, 1e-7)


def _slowest(ring: Comm, work: Callable[[], object], device: torch.device) -> float:
    """Return the slowest rank's seconds of ``work``: the median of several rounds, after a warm-up round."""
    slowest = []
    for _ in range(1 + _ROUNDS):
        _gather_seconds(ring, 0.0, device)  # a barrier
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest.append(float(_gather_seconds(ring, time.perf_counter() - began, device).max()))
    return median(slowest[1:])


def _gather_seconds(ring: Comm, seconds: float, device: torch.device) -> Tensor:
    mine = torch.tensor([seconds], dtype=torch.float64, device=device)
    return torch.cat(ring.all_gather(mine, [(1,)] * ring.size))
