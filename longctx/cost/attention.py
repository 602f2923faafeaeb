"""Seconds and bytes per rank of one layer's attention, for each strategy.

The symbols are those of arXiv 2411.01783, Table 1: T new tokens, P cached tokens, N ranks, H_Q query heads, H_KV
KV heads, and head dimension D_H; e is the bytes per element.  Heads are counted per rank, after tensor parallelism and
Ulysses have divided them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from longctx.cost.hardware import Hardware, Link
from longctx.cost.window import Reach, reach_of


@dataclass(frozen=True)
class Work:
    """The attention of one layer over a batch of sequences, on a ring of ``ranks``.

    Sequence i has ``new[i]`` new tokens, which attend to its ``cached[i]`` cached tokens and causally to each other.
    ``heads`` and ``kv_heads`` count one rank's heads, as a fraction if the mesh does not divide them.  ``window`` is
    the largest number of keys that a query sees, including its own; None is no window.  ``partial_element_bytes`` is
    the size of an element of a partial output: 4 in longctx (float32), 2 in arXiv 2411.01783.
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
        """Number of new tokens (T), summed over the sequences."""
        return sum(self.new)

    @property
    def total(self) -> int:
        """Number of new and cached tokens (T + P), summed over the sequences."""
        return sum(self.new) + sum(self.cached)

    @property
    def kv_block_bytes(self) -> float:
        """Bytes of the keys and values that a rank holds: 2 * ((T + P) / N) * H_KV * D_H * e."""
        return self.total / self.ranks * self.kv_row_bytes

    @property
    def q_block_bytes(self) -> float:
        """Bytes of the queries that a rank holds: (T / N) * H_Q * D_H * e."""
        return self.new_total / self.ranks * self.q_row_bytes

    @property
    def partial_bytes(self) -> float:
        """Bytes of a rank's partial outputs for other ranks' queries: (N - 1) * (T / N) * H_Q * (D_H + 1) elements."""
        return (self.ranks - 1) * self.new_total / self.ranks * self.partial_row_bytes

    @property
    def kv_row_bytes(self) -> float:
        """Bytes of a row of keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def q_row_bytes(self) -> float:
        """Bytes of a row of queries."""
        return self.heads * self.head_dim * self.element_bytes

    @property
    def partial_row_bytes(self) -> float:
        """Bytes of a row of partial outputs, with one log-sum-exp per head."""
        return self.heads * (self.head_dim + 1) * self.partial_element_bytes

    @property
    def reach(self) -> Reach:
        """`Reach` of this attention: the rows that a rank sends around the ring, and the blocks that it computes.

        Without a window these are all rows and blocks; with one, only those that some query sees.
        """
        return reach_of(tuple(self.new), tuple(self.cached), self.ranks, self.window)

    @property
    def flops(self) -> float:
        """FLOPs of all ``ranks`` of the ring: 4 D_H H_Q per visible (query, key) pair.

        A sequence has T P + T (T + 1) / 2 pairs.  With a window of w keys, its first w - P new queries see all earlier
        keys; each later one sees w keys.
        """
        pairs = 0.0
        for t, p in zip(self.new, self.cached, strict=True):
            early = t if self.window is None else min(t, max(0, self.window - p))
            pairs += early * p + early * (early + 1) / 2 + (t - early) * (self.window or 0)
        return 4 * self.head_dim * self.heads * pairs

    @property
    def causal_flops(self) -> float:
        """FLOPs of all ``ranks`` of the ring in causal tiles, as `longctx.attention.tiles` cuts a zigzag layout.

        A rank's two chunks make one causal tile if a sequence has no cached tokens: N tiles of t / N rows.  After
        cached tokens, each of the 2 N chunks makes its own, except the middle two, which follow one another on one
        rank.  A window adds a tile at its far edge; if it is shorter than a tile, all pairs are in such tiles.
        """
        flops = 0.0
        for t, p in zip(self.new, self.cached, strict=True):
            rows = t / self.ranks if self.ranks == 1 or not p else t / (2 * self.ranks)
            pairs = t**2 * (self.ranks + 1) / (2 * self.ranks) ** 2 if p else t**2 / (2 * self.ranks)
            if self.window is not None:
                seen = replace(self, new=[t], cached=[p]).flops / (4 * self.head_dim * self.heads)
                pairs = seen if self.window <= rows else min(seen, pairs * (2 if p else 1))
            flops += 4 * self.head_dim * self.heads * pairs
        return flops


@dataclass(frozen=True)
class Cost:
    """Cost of one layer's attention on one rank.

    ``seconds`` is the total; ``exposed_s`` is the part of it that is communication which no computation hides.
    """

    seconds: float
    exposed_s: float
    bytes_sent: float


def block_seconds(work: Work, hardware: Hardware) -> float:
    """Return the seconds of one of a rank's N blocks: its queries against one rank's keys.

    Zigzag spreads the pairs evenly over ranks and steps, so a block has 1 / N^2 of them.  The block is compute-bound
    or, with few rows, bound by reading its keys and values.  Under a window, the result is the mean over the N blocks,
    some of which have no visible pair and take no time.

    Causal tiles take ``hardware.causal`` times as long as their pairs.
    """
    pairs = work.flops + (hardware.causal - 1) * work.causal_flops
    arithmetic = pairs / work.ranks**2 / hardware.flops
    read = work.reach.kv_read / work.ranks * work.kv_row_bytes
    return start_seconds(work, hardware) + max(arithmetic, read / hardware.kv_bytes_per_s)


def start_seconds(work: Work, hardware: Hardware) -> float:
    """Return the part of `block_seconds` that does not depend on the rows: ``hardware.block_s`` per computed block.

    Under a window, it is the mean over the rank's N blocks, of which those without a visible pair take no time.
    """
    return hardware.block_s * work.reach.blocks / work.ranks


def _step(compute_s: float, send_s: float, hardware: Hardware) -> float:
    """Return the seconds of computing and sending at once: the longer time plus the exposed part of the shorter one.

    ``hardware.overlap`` is the fraction of the shorter time that is hidden.
    """
    longer, shorter = max(compute_s, send_s), min(compute_s, send_s)
    return longer + (1 - hardware.overlap) * shorter


def pass_kv_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of pass-KV (Alg. 2): N - 1 steps that compute a block and receive the next, and a last block."""
    block, sent = block_seconds(work, hardware), [rows * work.kv_row_bytes for rows in work.reach.kv_hops]
    seconds = sum(_step(block, hardware.hop.seconds(size), hardware) for size in sent) + block
    return Cost(seconds, seconds - work.ranks * block, sum(work.reach.kv_hops) * work.kv_row_bytes)


def pass_q_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of pass-Q (Alg. 3): N - 1 steps that send queries, a last block, and an exposed all-to-all.

    The all-to-all returns the partial outputs to the ranks of their queries.
    """
    block, sent = block_seconds(work, hardware), [rows * work.q_row_bytes for rows in work.reach.q_hops]
    returned = work.reach.q_rows * work.partial_row_bytes
    seconds = sum(_step(block, hardware.hop.seconds(size), hardware) for size in sent) + block
    seconds += hardware.exchange.seconds(returned)
    return Cost(seconds, seconds - work.ranks * block, sum(sent) + returned)


def all_gather_kv_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of an exposed all-gather of keys and values, followed by all N blocks."""
    size = work.reach.kv_rows * work.kv_row_bytes
    gather = hardware.exchange.seconds(size)
    return Cost(gather + work.ranks * block_seconds(work, hardware), gather, size)


COSTS: dict[str, Callable[[Work, Hardware], Cost]] = {
    "pass_kv": pass_kv_cost,
    "pass_q": pass_q_cost,
    "all_gather_kv": all_gather_kv_cost,
}


def ulysses_bytes(work: Work, degree: int) -> tuple[float, float]:
    """Return the bytes that a rank sends in Ulysses' two all-to-alls around ``work``: (of q, k and v; of the output).

    ``work`` counts the heads that a rank has after the first all-to-all: one of U = ``degree`` shares.  Before it, a
    rank has T / (N U) rows with all heads.  It keeps its own share and sends the other U - 1: (U - 1) T / (N U) rows of
    H_Q + 2 H_KV heads.  After attention, it sends back equally many rows of H_Q heads.
    """
    row = (degree - 1) * work.new_total / (work.ranks * degree) * work.head_dim * work.element_bytes
    return row * (work.heads + 2 * work.kv_heads), row * work.heads


def ulysses_seconds(work: Work, degree: int, link: Link) -> float:
    """Return the seconds, hidden by nothing, of Ulysses' two all-to-alls around ``work`` over ``degree`` ranks."""
    return sum(link.seconds(size) for size in ulysses_bytes(work, degree))


def backward_cost(work: Work, hardware: Hardware) -> Cost:
    """Return the cost of the backward, which is the same for every strategy: keys, values and gradients pass the ring.

    The arithmetic of a block takes ``hardware.backward`` times as long as in the forward.  Keys and values make N - 1
    hops.  The float32 sums of their gradients follow one hop later and make N hops.
    """
    start = start_seconds(work, hardware)
    backward = start + hardware.backward * (block_seconds(work, hardware) - start)
    keys = [rows * work.kv_row_bytes for rows in work.reach.kv_hops]
    *sums, last = [rows * work.kv_row_bytes * 4 / work.element_bytes for rows in work.reach.sum_hops] or [0.0]
    sent = [a + b for a, b in zip(keys, sums, strict=True)]
    seconds = sum(_step(backward, hardware.hop.seconds(size), hardware) for size in sent)
    seconds += backward + hardware.hop.seconds(last)
    return Cost(seconds, seconds - work.ranks * backward, sum(sent) + last)
