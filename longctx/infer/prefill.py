"""One pass over new tokens against a sharded cache: a prompt's prefill, a later turn's, or one decoded token.

They differ in the layout of the new tokens alone: of a decoded token one rank has a row and the others none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longctx.attention.kernel import Kernel
from longctx.attention.layout import Layout
from longctx.infer.cache import KVCache
from longctx.megatron.attention import Pass
from longctx.megatron.model import GPTModel, hidden_states, rotary_angles
from longctx.parallel.comm import Comm
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import ring_attention
from longctx.parallel.ulysses import over_heads
from longctx.schema import ModelShape
from longctx.shapes import Float, Tensor

LayerDone = Callable[[], None]


@dataclass(frozen=True)
class Engine:
    """A model, and the ranks that share its sequence: ulysses x ring, rank = ring rank * U + ulysses rank.

    ``layers`` says whose layers it is made of: megatron-core's ``local`` ones or Transformer Engine's (``te``).
    """

    model: GPTModel
    shape: ModelShape
    tp: Comm
    ulysses: Comm
    ring: Comm
    kernel: Kernel
    layers: str = "local"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def rank(self) -> int:
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    @property
    def ranks(self) -> int:
        return self.ring.size * self.ulysses.size

    def cache(self, tokens: int) -> KVCache:
        """An empty cache with room for this rank's share of ``tokens``."""
        return KVCache(self.ring.size, self.ring.rank, -(-tokens // self.ring.size) + 2)


@torch.inference_mode()
def run_pass(
    engine: Engine,
    tokens: Tensor,
    layout: Layout,
    cache: KVCache,
    strategy: Strategy,
    done: LayerDone = lambda: None,
) -> Float[Tensor, "s b hidden"]:
    """Final hidden states of this rank's rows of ``tokens`` [total]; ``cache`` grows by all of them.

    ``layout`` deals the new tokens to ulysses x ring ranks; positions continue where ``cache`` ends.
    ``done`` is called after each layer's attention.
    """
    layout = layout.after(cache.layout)
    queries = layout.gathered(engine.ulysses.size)
    cache.extend(queries)
    ring = Ring(engine.ring, queries, cache.layout)
    inner = ring_attention(ring, engine.kernel, strategy)
    first = engine.rank - engine.ulysses.rank
    rows = [layout.rows(first + member) for member in range(engine.ulysses.size)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def over_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return inner(q, *cache.append(layer, k, v))

        out = over_heads(engine.ulysses, rows, over_cache)(q, k, v)
        done()
        return out

    mine = layout.shard(tokens, engine.rank).to(engine.device)
    angles = rotary_angles(engine.shape, layout.positions(engine.rank).to(engine.device))
    return hidden_states(engine.model, mine.unsqueeze(0), angles, Pass(attend=attend))
