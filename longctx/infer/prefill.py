"""One pass over new tokens against a sharded cache: a prompt's prefill, a later turn's, or one decoded token.

They differ in the layout of the new tokens alone: of a decoded token one rank has a row and the others none.
"""

from collections.abc import Callable, Mapping

import torch

from longctx.attention.kernel import attend_tiles
from longctx.attention.layout import Layout
from longctx.attention.mask import causal_within
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.infer.cache import Cache
from longctx.infer.engine import Engine
from longctx.megatron.attention import Pass
from longctx.megatron.model import hidden_states, rotary_angles
from longctx.parallel.comm import doing
from longctx.parallel.ring import Ring, Strategy, gather_merge
from longctx.parallel.strategy import ring_attention
from longctx.parallel.ulysses import over_heads, share_of_heads
from longctx.shapes import Float, Positions, Tensor

LayerDone = Callable[[], None]


@torch.inference_mode()
def run_pass(
    engine: Engine,
    tokens: Tensor,
    layout: Layout,
    cache: Cache,
    strategies: Mapping[int | None, Strategy],
    done: LayerDone = lambda: None,
) -> Float[Tensor, "s b hidden"]:
    """Final hidden states of this rank's rows of ``tokens`` [total]; ``cache`` grows by all of them.

    ``layout`` deals the new tokens to ulysses x ring ranks, its documents being ``cache``'s sequences; positions
    continue where they end.  ``strategies`` has one for the layers of each window.  ``done`` is called after each
    layer's attention.
    """
    layout = layout.after(cache.layout)
    queries = layout.gather(engine.ulysses.size)
    cache.extend(queries)
    inner = {
        window: ring_attention(
            Ring(engine.ring, queries, cache.layout, causal_within(window)), engine.kernel, strategies[window]
        )
        for window in set(engine.shape.windows)
    }
    first = engine.rank - engine.ulysses.rank
    rows = [layout.rows(first + member) for member in range(engine.ulysses.size)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def over_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return inner[engine.shape.windows[layer]](q, *cache.append(layer, k, v))

        with doing(f"layer {layer}"):
            out = over_heads(engine.ulysses, rows, over_cache)(q, k, v)
        done()
        return out

    mine = layout.shard(tokens, engine.rank)
    return _hidden(engine, mine, layout.positions(engine.rank), Pass(attend=attend))


@torch.inference_mode()
def run_replicated(
    engine: Engine, tokens: Tensor, layout: Layout, cache: Cache, done: LayerDone = lambda: None
) -> Float[Tensor, "s b hidden"]:
    """Final hidden states of all ``tokens`` [total], on every rank, with one exchange a layer.

    For few rows: every rank projects them all, looks at the keys that it caches, and the answers meet (tree
    attention's idea, arXiv 2408.04093).  ``layout`` says which ring rank caches which of them.
    """
    layout = layout.after(cache.layout)
    cache.extend(layout)
    all_rows = layout.on_one_rank()
    queries, keys = all_rows.ranks[0], cache.layout.ranks[engine.ring.rank]
    tiles = {window: visible_tiles(queries, keys, causal_within(window)) for window in set(engine.shape.windows)}
    cached_here = layout.index(engine.ring.rank).to(engine.device)
    degree, member = engine.ulysses.size, engine.ulysses.rank

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (share_of_heads(x, degree, member) for x in (q, k, v))
        held = cache.append(layer, k[:, cached_here], v[:, cached_here])
        seen = empty_partial(q)
        attend_tiles(seen, q, *held, tiles[engine.shape.windows[layer]], engine.kernel)
        with doing(f"layer {layer}"):
            out = gather_merge(seen, engine.answers, degree).to(q.dtype)
        done()
        return out

    return _hidden(engine, tokens, all_rows.positions(0), Pass(attend=attend))


def _hidden(engine: Engine, tokens: Tensor, positions: Positions, one_pass: Pass) -> Float[Tensor, "s b hidden"]:
    angles = rotary_angles(engine.shape, positions.to(engine.device))
    return hidden_states(engine.model, tokens.to(engine.device).unsqueeze(0), angles, one_pass)
