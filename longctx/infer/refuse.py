"""Refusals of a turn: prompts that do not fit the model, and logits that are NaN or infinite."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from longctx.infer.cache import KVCache
from longctx.infer.engine import Engine
from longctx.model_shape import ModelShape

NOT_FINITE = -1  # sent to the other ranks in place of a token


def refuse_prompts(
    shape: ModelShape,
    so_far: Mapping[int, int],
    prompts: Mapping[int, Sequence[int]],
    max_new_tokens: Mapping[int, int],
) -> None:
    """Raise ValueError unless ``prompts`` and their answers fit a model of ``shape``.

    No prompts, an empty prompt and negative ``max_new_tokens`` are refused, too.  The arguments after ``shape`` are by
    sequence.  ``so_far`` has the number of tokens that a sequence has already (absent: 0).
    """
    if not prompts:
        raise ValueError("the turn has no prompts; give at least one sequence some tokens")
    for i, prompt in prompts.items():
        if not prompt:
            raise ValueError(f"the prompt of sequence {i} is empty; give it some tokens")
        shape.refuse_unknown_token(max(prompt), f"the prompt of sequence {i}")
        if max_new_tokens[i] < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens[i]} of sequence {i} is negative; use 0 or more")
        before = so_far.get(i, 0)
        if (total := before + len(prompt) + max_new_tokens[i]) > shape.max_positions:
            raise ValueError(
                f"sequence {i} would have {total:,} tokens ({before:,} so far, {len(prompt):,} new, "
                f"max_new_tokens={max_new_tokens[i]}), but the model's context is {shape.max_positions:,}; "
                "use a shorter prompt or fewer max_new_tokens, or start a new session (with a larger "
                "model.max_positions, if the model is to have one)"
            )


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
    place = f"layer {first} is the first with such keys or values"
    if first == layers:
        place = f"the keys and values of all {layers} layers are finite"
    raise ValueError(
        f"no token can be chosen from logits that are NaN or infinite; {place}: "
        "use model.dtype=float32, or a checkpoint whose weights are not damaged"
    )


def _is_finite(*tensors: torch.Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)
