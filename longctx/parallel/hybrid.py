"""Ulysses x ring over a layout, composed: what a layer of a sharded model attends with."""

from longctx.attention.kernel import Kernel
from longctx.attention.layout import Layout
from longctx.attention.mask import CAUSAL, Mask
from longctx.attention.partial import Partial
from longctx.parallel.comm import Comm
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import ring_attention
from longctx.parallel.ulysses import Attention, over_heads


def hybrid_attention(
    ulysses: Comm,
    ring: Comm,
    layout: Layout,
    kernel: Kernel,
    strategy: Strategy,
    mask: Mask = CAUSAL,
    kept: list[Partial] | None = None,
) -> Attention:
    """Differentiable attention of the rows that ``layout`` deals to ulysses x ring ranks.

    Rank = ring rank * U + ulysses rank; source: arXiv 2405.07719, Alg. 1.  ``kept`` is `ring_attention`'s.
    """
    rows = [layout.rows(ring.rank * ulysses.size + member) for member in range(ulysses.size)]
    around = layout.gathered(ulysses.size)
    return over_heads(ulysses, rows, ring_attention(Ring(ring, around, around, mask), kernel, strategy, kept=kept))
