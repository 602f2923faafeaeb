"""Seconds of a decode step in which every context rank has every row: ``gather_merge`` against ``sharded``.

N context ranks decode one token for each of B sequences.  Each rank holds L layers of w weights, and an output layer
of v weights, with e bytes per weight.  A rank reads R bytes and computes C FLOPs per second.  A product of B rows with
m weights takes p(m) = max(m e / R, 2 B m / C).  An exchange in which a rank sends n bytes takes
x(n) = latency + n / bandwidth.  A step takes, without attention:

    gather_merge  L (p(w) + x(partials)) + p(v)
    sharded       L (p(w / N) + x(queries, keys, values) + x(partials / N) + 2 x(hidden)) + p(v / N) + x(logits)

In both strategies a rank attends with all heads to the keys that it caches.  Attention takes the same time in both, so
it is left out, and the cached length does not matter.  ``sharded`` reads fewer weights, but has three more exchanges
per layer.  It is faster if these exchanges take less than (1 - 1 / N) p(w): with large layers or low latency.
"""

from dataclasses import dataclass

from longctx.cost.hardware import Link


@dataclass(frozen=True)
class DecodeHardware:
    """A rank's rates in decoding: reading weights (few rows), computing (many rows), and exchanging."""

    weight_bytes_per_s: float
    flops: float
    exchange: Link


@dataclass(frozen=True)
class DecodeWork:
    """A decode step of ``batch`` sequences over ``ranks`` context ranks.

    ``layer_weights`` and ``head_weights`` count the weights of one layer and of the output layer.  These numbers,
    ``heads``, ``kv_heads`` and ``vocab_size`` are one tensor-parallel rank's.  ``element_bytes`` is the size of a
    weight and of an activation.
    """

    batch: int
    ranks: int
    layers: int
    layer_weights: int
    head_weights: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    element_bytes: int


def product_seconds(weights: float, work: DecodeWork, hardware: DecodeHardware) -> float:
    """Return p(``weights``) of the module docstring."""
    read = weights * work.element_bytes / hardware.weight_bytes_per_s
    return max(read, 2 * work.batch * weights / hardware.flops)


def gather_merge_seconds(work: DecodeWork, hardware: DecodeHardware) -> float:
    """Return the seconds of a step by ``gather_merge``, without attention itself."""
    exchange = hardware.exchange.seconds((work.ranks - 1) * _partial_bytes(work))
    layer = product_seconds(work.layer_weights, work, hardware) + exchange
    return work.layers * layer + product_seconds(work.head_weights, work, hardware)


def sharded_seconds(work: DecodeWork, hardware: DecodeHardware) -> float:
    """Return the seconds of a step by ``sharded``, without attention itself."""
    others, x = (work.ranks - 1) / work.ranks, hardware.exchange.seconds
    row_bytes = work.batch * work.element_bytes
    exchanges = x(others * row_bytes * (work.heads + 2 * work.kv_heads) * work.head_dim)
    exchanges += x(others * _partial_bytes(work)) + 2 * x((work.ranks - 1) * row_bytes * work.hidden)
    layer = product_seconds(work.layer_weights / work.ranks, work, hardware) + exchanges
    logits = x(others * row_bytes * work.vocab_size)
    return work.layers * layer + product_seconds(work.head_weights / work.ranks, work, hardware) + logits


def _partial_bytes(work: DecodeWork) -> int:
    """Return the bytes of one rank's partial outputs and log-sum-exps, in float32."""
    return work.batch * work.heads * (work.head_dim + 1) * 4


def choose_decode(work: DecodeWork, hardware: DecodeHardware) -> tuple[str, str]:
    """Return the cheaper strategy, ``sharded`` or ``gather_merge``, and the reason in words."""
    if work.ranks == 1:
        return "gather_merge", "one context rank has no rank to share weights with"
    shared, merged = sharded_seconds(work, hardware), gather_merge_seconds(work, hardware)
    why = f"without attention a step takes {shared * 1e3:.3g} ms sharded, {merged * 1e3:.3g} ms by gather_merge"
    return ("sharded" if shared < merged else "gather_merge"), why
