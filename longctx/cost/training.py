"""Model FLOPs of a training step, and model FLOPs utilisation (MFU).

Only matrix products count, with 2 FLOPs for a multiplication and its addition.  Each weight is used once per token in
the forward and twice in the backward (gradients of its input and of itself): 6 FLOPs per weight and token.  The symbols
are T tokens, L layers, hidden size H, n query and m KV heads of dimension d, FFN size F and vocabulary size V.  A gated
FFN (SwiGLU) has three matrices; an FFN without a gate has two:

    projections   6 T L (2 H n d + 2 H m d)       queries and output, keys and values
    ffn           6 T L 3 H F with a gate, 6 T L 2 H F without; for experts: the chosen experts and the router
    head          6 T H V                         the embedding is a look-up without FLOPs

A visible pair of a query and a key takes d multiplications for its score and d for its value, in each of n heads:
4 n d FLOPs forward, 12 n d with the backward.  A document of s tokens has s^2 pairs without causal halving and
s (s + 1) / 2 with it.  Tokens of different packed documents form no pairs.  With a window of w keys, a query has w
pairs; with causal halving the first w queries have fewer:

    scores        12 n d sum over layers and documents of  s min(s, w)  or  e (e + 1) / 2 + (s - e) w, e = min(s, w)

Without halving this equals `num_floating_point_operations` of Megatron-LM.  With that count, arXiv 2405.07719 reports
86 % MFU in its first version.  Its fifth version halves projections and scores together and reports 47 % for the same
steps.  Recomputation (of activations, or of the scores in a flash backward) is not counted.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable


@runtime_checkable
class Mixture(Protocol):
    """The sizes of a mixture of experts; `longctx.model_shape.Experts` provides them."""

    @property
    def count(self) -> int: ...
    @property
    def per_token(self) -> int: ...
    @property
    def ffn(self) -> int: ...


@runtime_checkable
class RotaryEmbedding(Protocol):
    """The frequencies of a rotary embedding, one a pair of channels; `longctx.model_shape.Rotary` provides them."""

    @property
    def frequencies(self) -> Sequence[float]: ...


@runtime_checkable
class Decoder(Protocol):
    """The dimensions that determine a decoder's FLOPs; `longctx.model_shape.ModelShape` provides them."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def ffn_weights_per_token(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def mixture(self) -> Mixture | None: ...
    @property
    def experts(self) -> Sequence[Mixture | None]: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def norms(self) -> Literal["pre", "post", "sandwich"]: ...
    @property
    def qk_norm(self) -> Literal["none", "head", "width"]: ...
    @property
    def layer_norm(self) -> bool: ...
    @property
    def zero_centered(self) -> bool: ...
    @property
    def activation(self) -> str: ...
    @property
    def residual_scale(self) -> float: ...
    @property
    def glu_limit(self) -> float | None: ...
    @property
    def rotaries(self) -> Sequence[RotaryEmbedding | None]: ...


def train_flops(shape: Decoder, lengths: Sequence[int], causal: bool) -> int:
    """Return the FLOPs of one forward and backward over packed documents of ``lengths`` tokens.

    With ``causal``, only visible pairs count (causal halving).  Without it, each query counts as many keys as its
    document or its window has, whichever is smaller.
    """
    return sum(train_flops_by_part(shape, lengths, causal).values())


def train_flops_by_part(shape: Decoder, lengths: Sequence[int], causal: bool) -> dict[str, int]:
    """Return `train_flops` split into "projections", "scores", "ffn" and "head"."""
    tokens = sum(lengths)
    heads = 2 * shape.heads + 2 * shape.kv_heads
    pairs = sum(count_pairs(length, window, causal) for window in shape.windows for length in lengths)
    return {
        "projections": 6 * tokens * shape.layers * shape.hidden * heads * shape.head_dim,
        "scores": 12 * shape.heads * shape.head_dim * pairs,
        "ffn": 6 * tokens * shape.ffn_weights_per_token,
        "head": 6 * tokens * shape.hidden * shape.vocab_size,
    }


def count_pairs(length: int, window: int | None, causal: bool) -> int:
    """Count the visible pairs (query, key) of a document of ``length`` tokens, ``window`` keys a query (None: all).

    With ``causal``, a query sees its own key and earlier ones.  Without it, each query counts as min(length, window)
    keys.
    """
    early = length if window is None else min(length, window)
    if not causal:
        return length * early
    return early * (early + 1) // 2 + (length - early) * early


def mfu(flops: float, seconds: float, ranks: int, peak_flops: float | None) -> float | None:
    """Return model FLOPs utilisation: achieved FLOP/s over the peak of ``ranks`` ranks; None if no peak is known."""
    return None if peak_flops is None else flops / (seconds * ranks * peak_flops)
