"""Refuse to choose a token from logits that are NaN or infinite, and name the layer where the values went wrong."""

from collections.abc import Iterable

import torch

from longctx.infer.cache import KVCache
from longctx.infer.engine import Engine

NOT_FINITE = -1  # sent to the other ranks in place of a token


def refuse_not_finite(engine: Engine, tokens: Iterable[int], caches: Iterable[KVCache]) -> None:
    """Raise ValueError, on every rank, if one of ``tokens`` is `NOT_FINITE`.

    The message names the first layer whose keys or values in ``caches``, on any rank, are NaN or infinite.  All ranks
    must call this with the same ``tokens``.
    """
    if NOT_FINITE not in tokens:
        return
    layers = engine.shape.layers
    cached = list(caches)
    first = next((i for i in range(layers) if not all(_is_finite(*cache.layer(i)) for cache in cached)), layers)
    mine = torch.tensor([first], device=engine.device)
    first = int(torch.cat(engine.context.all_gather(mine, [(1,)] * engine.ranks)).min())
    place = f"those of all {layers} layers are finite" if first == layers else f"those of layer {first} are the first"
    raise ValueError(
        f"no token can be chosen from logits that are NaN or infinite; of keys and values, {place}: "
        "use model.dtype=float32, or a checkpoint whose weights are not damaged"
    )


def _is_finite(*tensors: torch.Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)
