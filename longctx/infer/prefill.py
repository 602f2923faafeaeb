"""One pass over new tokens with a sharded cache: the prefill of a prompt or of a later turn, or one decoded token.

These differ only in the layout of the new tokens: one rank has the row of a decoded token, the other ranks have no
row.  In `run_replicated`, every rank has the new rows.  `run_together` runs rows of both kinds in one pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from longctx.attention.kernel import attend_over_each
from longctx.attention.layout import Layout
from longctx.attention.mask import causal_within
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


@dataclass(frozen=True)
class Rows:
    """Rows of a pass on this rank: their tokens [s] and positions [s], and the function by which they attend."""

    tokens: Int[Tensor, " s"]
    positions: Positions
    attend: LayerAttention


def run_pass(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    strategies: Mapping[int | None, Strategy],
    done: LayerDone = lambda: None,
) -> Float[Tensor, "s b hidden"]:
    """Run the model over ``tokens`` [total] and return the final hidden states of this rank's rows.

    ``cache`` grows by all new tokens.  All ranks must call this.  The arguments and errors are those of `sharded_rows`.
    """
    return run_together(engine, [sharded_rows(engine, tokens, layout, cache, strategies, done)])[0]


def run_replicated(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    done: LayerDone = lambda: None,
    *,
    share: WeightShare | None = None,
) -> Float[Tensor, "s b hidden"]:
    """Run the model over ``tokens`` [total] on every rank and return the final hidden states of all rows.

    ``cache`` grows by all new tokens.  All ranks must call this.  The arguments are those of `replicated_rows`.
    """
    return run_together(engine, [replicated_rows(engine, tokens, layout, cache, done, share=share)])[0]


@torch.inference_mode()
def run_together(engine: Engine, parts: Sequence[Rows]) -> Sequence[Float[Tensor, "_ b hidden"]]:
    """Run the model over the rows of all ``parts`` in one pass; return the final hidden states of each part, in order.

    All ranks must call this, each with its own rows of the same parts.  Each part attends by its own function.  All
    other work is by row: the weights are read once for all parts.
    """
    lengths = [len(part.tokens) for part in parts]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if len(parts) == 1:
            return parts[0].attend(layer, q, k, v, sinks)
        by_part = zip(parts, *(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([part.attend(layer, *rows, sinks) for part, *rows in by_part], 1)

    tokens = torch.cat([part.tokens.to(engine.device) for part in parts])
    positions = torch.cat([part.positions.to(engine.device) for part in parts])
    one_pass = Pass(attend=attend, rotary=rotary_tables(engine.shape, positions, engine.dtype))
    with engine.context.traffic.counted_as(ATTENTION):
        hidden: Tensor = hidden_states(engine.model, tokens.unsqueeze(0), one_pass)
    return torch.split(hidden, lengths)


@torch.inference_mode()
def sharded_rows(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    strategies: Mapping[int | None, Strategy],
    done: LayerDone = lambda: None,
) -> Rows:
    """Return this rank's share of ``tokens`` [total] as `Rows` for `run_together`; no layer runs here.

    ``layout`` shards the tokens over the ulysses x ring ranks.  Its documents are the sequences of ``cache``.  Its
    positions begin at 0, and are shifted to follow the cached ones.  The layout of ``cache`` grows by all new tokens at
    once.  ``strategies`` has the strategy by the layers' window (None: full attention).  The pass calls ``done`` after
    each layer's attention.

    The pass raises ValueError if the Ulysses degree does not fit the heads.  It also does so for inputs on which the
    engine's kernel has not been tested exact.
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

    return Rows(layout.shard(tokens, engine.rank), layout.positions(engine.rank), attend)


@torch.inference_mode()
def replicated_rows(
    engine: Engine,
    tokens: Int[Tensor, " total"],
    layout: Layout,
    cache: Cache,
    done: LayerDone = lambda: None,
    *,
    share: WeightShare | None = None,
) -> Rows:
    """Return all ``tokens`` [total] as `Rows`, the same on every rank, for `run_together`; no layer runs here.

    ``layout`` says which ring rank caches which token; the layout of ``cache`` grows by them at once.  This is for few
    rows (tree attention, arXiv 2408.04093).

    In the pass, every rank computes the queries, keys and values of all rows, and attends to the keys that it caches.
    One all-gather a layer merges the partial results.  The pass calls ``done`` after each layer's attention.

    With a ``share``, the caller must enter `WeightShare.in_use` around the pass.  Each rank then multiplies only its
    share of the weights.  One all-to-all gives each rank the merged output of its share of the heads.
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
        partial = attend_over_each(q, by_sequence, tiles[engine.shape.windows[layer]], engine.kernel)
        with doing(f"layer {layer}"):
            if share:
                heads = share.ranges(q.shape[2] * degree)
                out = scatter_merge(partial, engine.context, degree, heads, sinks)
            else:
                out = gather_merge(partial, engine.context, degree, sinks)
        done()
        return out.to(q.dtype)

    return Rows(tokens, all_rows.positions(0), attend)


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
