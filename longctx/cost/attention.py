"""Seconds and bytes per rank of one layer's attention, for each strategy.

The symbols are those of arXiv 2411.01783, Table 1: T new tokens, P cached tokens, N ranks, H_Q query heads, H_KV
KV heads, and head dimension D_H; e is the bytes per element.  Heads are counted per rank, after tensor parallelism and
Ulysses have divided them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.cost.hardware import Hardware, Link


@dataclass(frozen=True)
class Work:
    """The attention of one layer over a batch of sequences, on a ring of ``ranks``.

    Sequence i has ``new[i]`` new tokens, which attend to its ``cached[i]`` cached tokens and causally to each other.
    ``heads`` and ``kv_heads`` count one rank's heads, as a fraction if the mesh does not divide them.  ``window`` is
    the number of keys that a query sees at most, its own included; None is no window.  ``partial_element_bytes`` is the
    size of an element of a partial output: 4 in longctx (float32), 2 in arXiv 2411.01783.
    """

    new: Sequence[int]
    cached: Sequence[int]
    ranks: int
    heads: float
    kv_heads: float
    head_dim: int
    element_bytes: int
    window: int | None = None
    partial_element_bytes: int = 4

    @property
    def new_total(self) -> int:
        """T, summed over the sequences."""
        return sum(self.new)

    @property
    def total(self) -> int:
        """T + P, summed over the sequences."""
        return sum(self.new) + sum(self.cached)

    @property
    def kv_block_bytes(self) -> float:
        """Bytes of the keys and values that a rank holds: 2 (T + P) / N H_KV D_H e."""
        return 2 * self.total / self.ranks * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def q_block_bytes(self) -> float:
        """Bytes of the queries that a rank holds: T / N H_Q D_H e."""
        return self.new_total / self.ranks * self.heads * self.head_dim * self.element_bytes

    @property
    def partial_bytes(self) -> float:
        """Bytes of a rank's partial outputs for the other ranks' queries: (N - 1) T / N H_Q (D_H + 1) elements."""
        rows = (self.ranks - 1) * self.new_total / self.ranks
        return rows * self.heads * (self.head_dim + 1) * self.partial_element_bytes

    @property
    def flops(self) -> float:
        """FLOPs of all ranks: 4 D_H H_Q per visible (query, key) pair.

        There are T P + T (T + 1) / 2 pairs.  With a window of w keys, the first w - P new queries see all earlier keys;
        each later one sees w keys.
        """
        pairs = 0.0
        for t, p in zip(self.new, self.cached, strict=True):
            early = t if self.window is None else min(t, max(0, self.window - p))
            pairs += early * p + early * (early + 1) / 2 + (t - early) * (self.window or 0)
        return 4 * self.head_dim * self.heads * pairs


@dataclass(frozen=True)
class Cost:
    """Cost of one layer's attention on one rank.

    ``seconds`` is the total; ``exposed_s`` is the part of it in communication that no computation hides.
    """

    seconds: float
    exposed_s: float
    bytes_sent: float


def block_seconds(work: Work, hardware: Hardware) -> float:
    """Return the seconds of one of a rank's N blocks: its queries against one rank's keys.

    Zigzag spreads the pairs evenly over ranks and steps, so a block has 1 / N^2 of them.  Its time is bounded by the
    arithmetic or, for few rows, by reading the block's keys and values.
    """
    arithmetic = work.flops / work.ranks**2 / hardware.flops
    return hardware.block_s + max(arithmetic, work.kv_block_bytes / hardware.kv_bytes_per_s)


def _step(compute_s: float, send_s: float, hardware: Hardware) -> float:
    """Return the seconds of computing and sending at once: the longer, plus the part of the shorter that is not hidden.

    ``hardware.overlap`` is the fraction of the shorter one that is hidden.
    """
    longer, shorter = max(compute_s, send_s), min(compute_s, send_s)
    return longer + (1 - hardware.overlap) * shorter


def pass_kv_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of pass-KV (Alg. 2): N - 1 steps that compute a block and receive the next, and a last block."""
    block, send = block_seconds(work, hardware), hardware.hop.seconds(work.kv_block_bytes)
    hops = work.ranks - 1
    seconds = hops * _step(block, send, hardware) + block
    return Cost(seconds, seconds - work.ranks * block, hops * work.kv_block_bytes)


def pass_q_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of pass-Q (Alg. 3): N - 1 steps that send queries, a last block, and an exposed all-to-all.

    The all-to-all returns the partial outputs to the ranks of their queries.
    """
    block, send = block_seconds(work, hardware), hardware.hop.seconds(work.q_block_bytes)
    hops = work.ranks - 1
    seconds = hops * _step(block, send, hardware) + block + hardware.exchange.seconds(work.partial_bytes)
    return Cost(seconds, seconds - work.ranks * block, hops * work.q_block_bytes + work.partial_bytes)


def all_gather_kv_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of an exposed all-gather of keys and values, followed by all N blocks."""
    size = (work.ranks - 1) * work.kv_block_bytes
    gather = hardware.exchange.seconds(size)
    return Cost(gather + work.ranks * block_seconds(work, hardware), gather, size)


COSTS: dict[str, Callable[[Work, Hardware], Cost]] = {
    "pass_kv": pass_kv_cost,
    "pass_q": pass_q_cost,
    "all_gather_kv": all_gather_kv_cost,
}


def ulysses_bytes(work: Work, degree: int) -> tuple[float, float]:
    """Return the bytes that a rank sends in Ulysses' two all-to-alls around ``work``: (q, k and v out, output back).

    ``work`` counts the heads that one rank has after the exchange: one of U = ``degree`` shares.  Before it, a rank has
    T / (N U) rows with all heads.  It keeps its own share and sends the other U - 1: (U - 1) T / (N U) rows of
    H_Q + 2 H_KV heads.  After attention it sends as many rows of H_Q heads back.
    """
    row = (degree - 1) * work.new_total / (work.ranks * degree) * work.head_dim * work.element_bytes
    return row * (work.heads + 2 * work.kv_heads), row * work.heads


def ulysses_seconds(work: Work, degree: int, link: Link) -> float:
    """Return the seconds of Ulysses' two all-to-alls around ``work`` (`ulysses_bytes`); no computation hides them."""
    return sum(link.seconds(size) for size in ulysses_bytes(work, degree))


def backward_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of the backward, the same for every strategy: keys, values and their gradients pass a ring.

    A flash backward has 5 matrix products and the forward has 2, so a block takes 2.5 times the forward's arithmetic.
    Keys and values make N - 1 hops.  The float32 sums of their gradients follow one hop later and make N hops.
    """
    block = block_seconds(work, hardware)
    backward = hardware.block_s + 2.5 * (block - hardware.block_s)
    gradients = work.kv_block_bytes * 4 / work.element_bytes
    hops = work.ranks - 1
    send = hardware.hop.seconds(work.kv_block_bytes + gradients)
    last = hardware.hop.seconds(gradients) if hops else 0.0
    seconds = hops * _step(backward, send, hardware) + backward + last
    sent = hops * work.kv_block_bytes + (work.ranks * gradients if hops else 0.0)
    return Cost(seconds, seconds - work.ranks * backward, sent)
