"""Seconds of a decode step in which every context rank has every row: ``gather_merge`` against ``sharded``.

N context ranks decode one token for each of B sequences.  Each rank holds L layers of w weights, and an output layer of
v weights, with e bytes per weight.  A rank reads R bytes and computes C FLOPs per second.  A GEMM of B rows with m
weights takes p(m) = max(m e / R, 2 B m / C), and one of B / N rows, rounded up, takes p'(m).  A collective in which a
rank sends n bytes takes x(n) = latency + n / bandwidth.  A step takes, without attention:

    gather_merge  L (p(w) + x(partials)) + p'(v)
    sharded       L (p(w / N) + x(queries, keys, values) + x(partials / N) + 2 x(hidden)) + p(v / N) + x(logits)

In both strategies a rank attends with all heads of its Ulysses rank to the keys that it caches.  Attention takes the
same time in both, so it is left out, and the cached length does not matter.  In ``gather_merge``, each rank computes
the logits of some sequences.  ``sharded`` reads fewer weights, but has three more collectives per layer.  It is faster
if these take less than (1 - 1 / N) p(w), as with large layers or low latency.

With tp tensor-parallel ranks, w and v are one rank's.  The all-reduces of ``sharded`` then span all tp N ranks.
``gather_merge`` has all-reduces over the tp ranks, which take 2 L x(hidden) more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from longctx.cost.hardware import Link
from longctx.cost.numerals import three_digits

SHARED_ROWS = ("gather_merge", "sharded")  # decode strategies in which every context rank has every row


@dataclass(frozen=True)
class DecodeHardware:
    """A rank's rates in decoding: reading weights (few rows), GEMMs (many rows), and the link of its collectives."""

    weight_bytes_per_s: float
    flops: float
    exchange: Link


@dataclass(frozen=True)
class DecodeWork:
    """A decode step of ``batch`` sequences over ``ranks`` context ranks.

    Each group of ``ulysses`` of these ranks divides the heads.

    ``layer_weights`` and ``head_weights`` count the weights of one layer and of the output layer.  These two,
    ``heads``, ``kv_heads`` and ``vocab_size`` count what one of the ``tp`` tensor-parallel ranks has.
    ``element_bytes`` is the size of one activation or weight; ``layer_bytes`` is the size of all ``layer_weights``.
    A layer has ``sums`` tensor-parallel all-reduces of hidden states: 2, or less on average if some blocks drop one.
    ``pairs`` of its all-reduces sum two hidden states in one message.  ``norm_sums`` sum one number for each row, and
    always over the ``tp`` ranks alone: context ranks that share weights have all queries and keys by then.
    """

    batch: int
    ranks: int
    layers: int
    layer_weights: float
    layer_bytes: float
    head_weights: float
    hidden: int
    heads: float
    kv_heads: float
    head_dim: int
    vocab_size: float
    element_bytes: int
    ulysses: int = 1
    tp: int = 1
    sums: float = 2.0
    pairs: float = 0.0
    norm_sums: int = 0

    def layer_sums(self, ranks: int) -> Iterator[tuple[float, float]]:
        """Yield the number of all-reduces over ``ranks`` in a layer, and the bytes that a rank sends in each."""
        hidden = (ranks - 1) * self.batch * self.element_bytes * self.hidden
        yield self.sums, hidden
        if self.pairs:
            yield self.pairs, 2 * hidden
        if self.norm_sums and self.tp > 1:
            yield self.norm_sums, (self.tp - 1) * self.batch * 4  # float32


def product_seconds(work: DecodeWork, hardware: DecodeHardware, ranks: int) -> float:
    """Return the seconds of a decode step's GEMMs if n = ``ranks`` context ranks share the weights.

    This is L p(w / n) + p(v / n), in the notation of the module's docstring.  With n = 1 the ranks share no weights.
    Each of the ``work.ranks`` ranks then computes the logits of some sequences only: L p(w) + p'(v).
    """

    def seconds(weights: float, size: float, rows: int) -> float:
        return max(size / hardware.weight_bytes_per_s, 2 * rows * weights / hardware.flops) / ranks

    layer = seconds(work.layer_weights, work.layer_bytes, work.batch)
    head_rows = work.batch if ranks > 1 else math.ceil(work.batch / work.ranks)
    return work.layers * layer + seconds(work.head_weights, work.head_weights * work.element_bytes, head_rows)


def exchanges(work: DecodeWork, strategy: str) -> Iterator[tuple[float, float]]:
    """Yield, for each kind of collective in a step by ``strategy``, its number of calls and a rank's bytes per call.

    All-reduces over tensor-parallel ranks alone are left out.  Raises ValueError for a strategy without a formula.
    """
    if strategy not in SHARED_ROWS:
        raise ValueError(f"strategy={strategy} has no formula here: use {', '.join(SHARED_ROWS)}")
    others, row_bytes = (work.ranks - 1) / work.ranks, work.batch * work.element_bytes
    # A rank's partial outputs and log-sum-exps are float32.
    partials = work.batch * work.heads / work.ulysses * (work.head_dim + 1) * 4
    if strategy == "gather_merge":
        yield work.layers, (work.ranks - 1) * partials
        return
    yield work.layers, others * row_bytes * (work.heads + 2 * work.kv_heads) * work.head_dim
    yield work.layers, others * partials
    for count, size in work.layer_sums(work.tp * work.ranks):
        yield work.layers * count, size
    yield 1, others * row_bytes * work.vocab_size


def exchange_seconds(work: DecodeWork, link: Link, strategy: str) -> float:
    """Return the seconds over ``link`` of the collectives that `exchanges` lists for a decode step by ``strategy``.

    All-reduces over tensor-parallel ranks alone are left out.
    """
    return sum(count * link.seconds(size) for count, size in exchanges(work, strategy))


def gather_merge_seconds(work: DecodeWork, hardware: DecodeHardware) -> float:
    """Return the seconds of a decode step by ``gather_merge``: GEMMs and collectives, without attention itself."""
    tp_s = sum(count * hardware.exchange.seconds(size) for count, size in work.layer_sums(work.tp))
    exchanged = exchange_seconds(work, hardware.exchange, "gather_merge") + work.layers * tp_s
    return product_seconds(work, hardware, 1) + exchanged


def sharded_seconds(work: DecodeWork, hardware: DecodeHardware) -> float:
    """Return the seconds of a decode step by ``sharded``: GEMMs and collectives, without attention itself."""
    return product_seconds(work, hardware, work.ranks) + exchange_seconds(work, hardware.exchange, "sharded")


ON_ONE_RANK = ("gather_merge", "one context rank has no rank to share weights with")


def choose_decode(work: DecodeWork, hardware: DecodeHardware) -> tuple[str, str]:
    """Return the faster strategy for ``work``, ``sharded`` or ``gather_merge``, and the reason for the user."""
    if work.ranks == 1:
        return ON_ONE_RANK
    costs = {"sharded": sharded_seconds(work, hardware), "gather_merge": gather_merge_seconds(work, hardware)}
    times = (f"{name} {three_digits(seconds * 1e3)} ms" for name, seconds in costs.items())
    why = f"predicted without attention: {', '.join(times)} a step"
    return ("sharded" if costs["sharded"] < costs["gather_merge"] else "gather_merge"), why
