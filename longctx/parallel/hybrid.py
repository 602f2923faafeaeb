"""Ulysses x ring over a layout, composed: what the layers of a sharded model attend with."""

from dataclasses import dataclass

from longctx.attention.kernel import Kernel
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial
from longctx.parallel.comm import Comm
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import ring_attention
from longctx.parallel.ulysses import Attention, over_heads


@dataclass(frozen=True)
class Hybrid:
    """A sequence shared by ulysses x ring ranks; ``rows`` are those of this Ulysses group's members.

    Source: arXiv 2405.07719, Alg. 1.  Rank = ring rank * U + ulysses rank.
    """

    ulysses: Comm
    ring: Ring
    rows: tuple[int, ...]

    def attention(self, kernel: Kernel, strategy: Strategy, kept: list[Partial] | None = None) -> Attention:
        """Differentiable attention over the shared sequence; ``kept`` is `ring_attention`'s."""
        return over_heads(self.ulysses, self.rows, ring_attention(self.ring, kernel, strategy, kept=kept))


def hybrid(ulysses: Comm, ring: Comm, layout: Layout, mask: Mask = CAUSAL) -> Hybrid:
    """The rows that ``layout`` deals to ulysses x ring ranks, seen from one of them."""
    rows = tuple(layout.rows(ring.rank * ulysses.size + member) for member in range(ulysses.size))
    around = layout.gather(ulysses.size)
    return Hybrid(ulysses, Ring(ring, around, around, mask), rows)
