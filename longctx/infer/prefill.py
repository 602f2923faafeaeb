"""One pass over new tokens with a sharded cache: the prefill of a prompt or of a later turn, or one decoded token.

These differ only in the layout of the new tokens: one rank has the row of a decoded token, the other ranks have no
row.  In `run_replicated`, every rank has the new rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from longctx.attention.kernel import attend_over, attend_tiles
from longctx.attention.layout import Layout
from longctx.attention.mask import causal_within
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import split_keys, visible_tiles
from longctx.infer.cache import Cache
from longctx.infer.engine import ATTENTION, Engine
from longctx.megatron.attention import LayerAttention, Pass, rotary_tables
from longctx.megatron.model import hidden_states
from longctx.megatron.sharded import WeightShare
from longctx.parallel.comm import doing
from longctx.parallel.merge import gather_merge, scatter_merge
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import ring_attention
from longctx.parallel.ulysses import over_heads, share_of_heads
from longctx.shapes import Float, Int, Positions, Tensor

LayerDone = Callable[[], None]
Chunk = dict[int, list[int]]  # the new tokens of one pass, by sequence


@torch.inference_mode()
def run_pass(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    strategies: Mapping[int | None, Strategy],
    done: LayerDone = lambda: None,
) -> Float[Tensor, "s b hidden"]:
    """Run the model over ``tokens`` [total] and return the final hidden states of this rank's rows.

    ``layout`` shards the new tokens over the ulysses x ring ranks.  Its documents are the sequences of ``cache``, and
    their positions follow the cached ones.  ``cache`` grows by all new tokens.  ``strategies`` has the strategy by
    the layers' window (None: full attention).  ``done`` is called after each layer's attention.

    Raises ValueError for inputs that the engine's kernel has not been tested exact on, or if the Ulysses degree does
    not fit the heads.
    """
    # 1. Queries and cached keys as layouts over the ring.
    layout = layout.after(cache.layout)
    queries = layout.gather(engine.ulysses.size)
    cache.extend(queries)
    rings = {w: Ring(engine.ring, queries, cache.layout, causal_within(w)) for w in set(engine.shape.windows)}

    # 2. Each layer attends over the cache, within Ulysses' exchange of heads for rows.
    first = engine.rank - engine.ulysses.rank
    rows = [layout.rows(first + member) for member in range(engine.ulysses.size)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        window = engine.shape.windows[layer]
        mine = sinks if sinks is None else sinks.chunk(engine.ulysses.size)[engine.ulysses.rank]
        attention = ring_attention(rings[window], engine.kernel, strategies[window], mine)

        def over_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, *cache.append(layer, k, v))

        with doing(f"layer {layer}"):
            out = over_heads(engine.ulysses, rows, over_cache)(q, k, v)
        done()
        return out

    local_tokens = layout.shard(tokens, engine.rank)
    return _hidden(engine, local_tokens, layout.positions(engine.rank), attend)


@torch.inference_mode()
def run_replicated(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    done: LayerDone = lambda: None,
    *,
    share: WeightShare | None = None,
) -> Float[Tensor, "s b hidden"]:
    """Run the model over ``tokens`` [total] on every rank and return the hidden states of all rows.

    This is for few rows (tree attention, arXiv 2408.04093).  Every rank computes the queries, keys and values of all
    rows, and attends to the keys that it caches.  One all-gather a layer merges the partial results.  ``layout`` says
    which ring rank caches which rows.

    With a ``share`` (the caller has entered `WeightShare.in_use`), each rank multiplies only its share of the weights.
    One all-to-all then gives each rank the merged output of its share of the heads.
    """
    layout = layout.after(cache.layout)
    cache.extend(layout)
    all_rows = layout.on_one_rank()
    queries, keys = all_rows.ranks[0], cache.layout.ranks[engine.ring.rank]
    lengths = [one.rows(engine.ring.rank) for one in cache.layout.by_document()]
    tiles = {
        window: split_keys(visible_tiles(queries, keys, causal_within(window)), lengths)
        for window in set(engine.shape.windows)
    }
    rows_to_cache = layout.index(engine.ring.rank).to(engine.device)
    degree, member = engine.ulysses.size, engine.ulysses.rank

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        q, k, v = (share_of_heads(x, degree, member) for x in (q, k, v))
        by_sequence = cache.append_each(layer, k[:, rows_to_cache], v[:, rows_to_cache])
        by_tiles = tiles[engine.shape.windows[layer]]
        if len(by_tiles) == 1:
            partial = attend_over(q, *by_sequence[0], by_tiles[0], engine.kernel)
        else:
            partial = empty_partial(q)
            for keys_and_values, own in zip(by_sequence, by_tiles, strict=True):
                attend_tiles(partial, q, *keys_and_values, own, engine.kernel)
        with doing(f"layer {layer}"):
            if share:
                heads = share.ranges(q.shape[2] * degree)
                out = scatter_merge(partial, engine.context, degree, heads, sinks)
            else:
                out = gather_merge(partial, engine.context, degree, sinks)
        done()
        return out.to(q.dtype)

    with engine.context.traffic.counted_as(ATTENTION):
        return _hidden(engine, tokens, all_rows.positions(0), attend)


def _hidden(
    engine: Engine, tokens: Int[Tensor, " s"], positions: Positions, attend: LayerAttention
) -> Float[Tensor, "s b hidden"]:
    one_pass = Pass(attend=attend, rotary=rotary_tables(engine.shape, positions.to(engine.device), engine.dtype))
    return hidden_states(engine.model, tokens.to(engine.device).unsqueeze(0), one_pass)


def split_into_chunks(new: Mapping[int, list[int]], max_tokens: int | None) -> Iterator[Chunk]:
    """Yield all new tokens in order, ``max_tokens`` at a time (None: all at once), to bound activation memory.

    Example: 5 tokens of sequence 0 and 2 of sequence 1, 4 at a time: first 4 of 0, then 1 of 0 with 2 of 1.
    """
    chunk: Chunk = {}
    for i, tokens in new.items():
        remaining = tokens
        while remaining:
            room = len(remaining) if max_tokens is None else max_tokens - _total(chunk)
            chunk[i], remaining = remaining[:room], remaining[room:]
            if max_tokens is not None and _total(chunk) == max_tokens:
                yield chunk
                chunk = {}
    if chunk:
        yield chunk


def pack_tokens(chunk: Chunk) -> Int[Tensor, " total"]:
    """Concatenate the tokens of all sequences in ``chunk``, which has the tokens of a pass by sequence."""
    return torch.tensor([token for tokens in chunk.values() for token in tokens])


def _total(chunk: Mapping[int, Sequence[int]]) -> int:
    return sum(map(len, chunk.values()))
