"""What one layer's attention costs a rank, by strategy: seconds and bytes.

Symbols of arXiv 2411.01783, Table 1: T new and P cached tokens, N ranks, H_Q and H_KV heads and D_H, their width,
all of one rank, after tensor parallelism and Ulysses have divided the heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.cost.hardware import Hardware

_ANSWER_BYTES = 4  # answers travel in float32, and so does their log-sum-exp


@dataclass(frozen=True)
class Work:
    """Sequences of ``new`` and ``cached`` tokens, attended to together by a ring of ``ranks``."""

    new: Sequence[int]
    cached: Sequence[int]
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    window: int | None = None  # keys that a query sees at most, its own included

    @property
    def new_total(self) -> int:
        """T of all sequences."""
        return sum(self.new)

    @property
    def total(self) -> int:
        """T + P of all sequences."""
        return sum(self.new) + sum(self.cached)

    @property
    def kv_block_bytes(self) -> float:
        """Keys and values that a rank holds: 2 (T + P) / N H_KV D_H e."""
        return 2 * self.total / self.ranks * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def q_block_bytes(self) -> float:
        """Queries that a rank holds: T / N H_Q D_H e."""
        return self.new_total / self.ranks * self.heads * self.head_dim * self.element_bytes

    @property
    def answer_bytes(self) -> float:
        """A rank's answers to all but its own queries: (N - 1) T / N H_Q (D_H + 1) float32."""
        rows = (self.ranks - 1) * self.new_total / self.ranks
        return rows * self.heads * (self.head_dim + 1) * _ANSWER_BYTES

    @property
    def flops(self) -> float:
        """FLOPs of all ranks: 4 D_H H_Q for each (query, key) that see each other; T P + T^2 / 2 of them.

        Under a window of w keys only the first w - P new queries see all that there are; each later one sees w.
        """
        pairs = 0.0
        for t, p in zip(self.new, self.cached, strict=True):
            early = t if self.window is None else min(t, max(0, self.window - p))
            pairs += early * p + early * (early + 1) / 2 + (t - early) * (self.window or 0)
        return 4 * self.head_dim * self.heads * pairs


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer's attention; of those, ``exposed_s`` are communication that nothing hides."""

    seconds: float
    exposed_s: float
    bytes_sent: float


def block_seconds(work: Work, on: Hardware) -> float:
    """Seconds of one of a rank's N blocks.

    The pairs are even over ranks and steps (zigzag), so a block is 1/N^2 of all.  Either the arithmetic bounds it,
    or, for few rows, reading the block's keys and values does.
    """
    arithmetic = work.flops / work.ranks**2 / on.flops
    return on.block_s + max(arithmetic, work.kv_block_bytes / on.kv_bytes_per_s)


def _step(compute_s: float, send_s: float, on: Hardware) -> float:
    """Two times, a max: what is computed while a message is on its way hides it, as far as the machine can."""
    longer, shorter = max(compute_s, send_s), min(compute_s, send_s)
    return longer + (1 - on.overlap) * shorter


def pass_kv_cost(work: Work, on: Hardware) -> Cost:
    """Pass-KV (Alg. 2): N - 1 steps that compute a block while the next comes, and the last block."""
    block, send = block_seconds(work, on), on.hop.seconds(work.kv_block_bytes)
    hops = work.ranks - 1
    seconds = hops * _step(block, send, on) + block
    return Cost(seconds, seconds - work.ranks * block, hops * work.kv_block_bytes)


def pass_q_cost(work: Work, on: Hardware) -> Cost:
    """Pass-Q (Alg. 3): the same with queries for keys and values, then the answers, which nothing hides."""
    block, send = block_seconds(work, on), on.hop.seconds(work.q_block_bytes)
    hops = work.ranks - 1
    seconds = hops * _step(block, send, on) + block + on.exchange.seconds(work.answer_bytes)
    return Cost(seconds, seconds - work.ranks * block, hops * work.q_block_bytes + work.answer_bytes)


def all_gather_kv_cost(work: Work, on: Hardware) -> Cost:
    """All keys and values in one exchange, which nothing hides, then all blocks."""
    size = (work.ranks - 1) * work.kv_block_bytes
    gather = on.exchange.seconds(size)
    return Cost(gather + work.ranks * block_seconds(work, on), gather, size)


COSTS: dict[str, Callable[[Work, Hardware], Cost]] = {
    "pass_kv": pass_kv_cost,
    "pass_q": pass_q_cost,
    "all_gather_kv": all_gather_kv_cost,
}
