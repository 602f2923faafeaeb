"""Hybrid Ulysses x ring attention over a layout: the attention of the layers of a sharded model."""

from dataclasses import dataclass

from longctx.attention.kernel import Kernel
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.parallel.comm import Comm
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import SavedForward, ring_attention
from longctx.parallel.ulysses import Attention, over_heads
from longctx.shapes import Float, Tensor


@dataclass(frozen=True)
class Hybrid:
    """A sequence that is sharded over ulysses x ring ranks (arXiv 2405.07719, Alg. 1), seen from one of them.

    ``rows[u]`` is the number of rows of member u of this rank's Ulysses group.  Rank = ring rank * ulysses size +
    ulysses rank.
    """

    ulysses: Comm
    ring: Ring
    rows: tuple[int, ...]

    def attention(
        self,
        kernel: Kernel,
        strategy: Strategy,
        sinks: Float[Tensor, " hq"] | None = None,
        saved_forward: SavedForward | None = None,
    ) -> Attention:
        """Return a differentiable function that takes this rank's rows and attends over the whole sequence.

        ``sinks`` are the scores of the attention sinks of this tensor-parallel rank's heads, before Ulysses divides
        them.  See `ring_attention` for ``saved_forward``.
        """
        mine = sinks if sinks is None else sinks.chunk(self.ulysses.size)[self.ulysses.rank]
        inner = ring_attention(self.ring, kernel, strategy, mine, saved_forward)
        return over_heads(self.ulysses, self.rows, inner)


def hybrid(ulysses: Comm, ring: Comm, layout: Layout, mask: Mask = CAUSAL) -> Hybrid:
    """Return the `Hybrid` of a self-attention whose rows ``layout`` shards over ulysses x ring ranks."""
    rows = tuple(layout.rows(ring.rank * ulysses.size + member) for member in range(ulysses.size))
    over_ring = layout.gather(ulysses.size)
    return Hybrid(ulysses, Ring(ring, over_ring, over_ring, mask), rows)
