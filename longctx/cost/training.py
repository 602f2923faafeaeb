"""The FLOPs that a step of training asks for, whoever computes them: what MFU divides by.

Only products of matrices are counted, 2 FLOPs for a multiplication and its addition.  A weight meets each token
once in the forward and twice in the backward (the gradients of its input and of itself): 6 FLOPs a weight and token.
So, for T tokens, L layers, H hidden, n query and m KV heads of width d, an FFN of F (SwiGLU: three matrices), V words:

    projections   6 T L (2 H n d + 2 H m d)       queries and output, keys and values
    ffn           6 T L 3 H F
    head          6 T H V                         the embedding is a look-up, and costs nothing

A pair of a query and a key that meet takes d multiplications for its score and d for its share of the answer, in each
of n heads: 4 n d FLOPs forward, 12 n d with the backward.  The pairs of a document of s tokens are s^2 without causal
halving and s (s + 1) / 2 with it; documents that are packed together do not meet.  Under a window of w keys a query
meets w of them, and causally the first w queries fewer:

    scores        12 n d sum over layers and documents of  s min(s, w)  or  e (e + 1) / 2 + (s - e) w, e = min(s, w)

Without halving this is `num_floating_point_operations` of Megatron-LM, by which arXiv 2405.07719 reports 86 % MFU in
its first edition; its fifth halves projections and scores together, and reports 47 % for the same steps.  What is
computed twice (activation recomputation, the scores in a flash backward) is not asked for, and not counted.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decoder(Protocol):
    """What the FLOPs of a decoder depend on; `longctx.config.ModelShape` has it."""

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
    def vocab_size(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...


def train_flops(shape: Decoder, lengths: Sequence[int], causal: bool) -> int:
    """FLOPs of one forward and backward over packed documents of ``lengths`` tokens, with causal halving or without."""
    return sum(train_flops_by_part(shape, lengths, causal).values())


def train_flops_by_part(shape: Decoder, lengths: Sequence[int], causal: bool) -> dict[str, int]:
    """`train_flops`, by what takes them: projections, scores, ffn, head."""
    tokens = sum(lengths)
    heads = 2 * shape.heads + 2 * shape.kv_heads
    seen = sum(pairs(length, window, causal) for window in shape.windows for length in lengths)
    return {
        "projections": 6 * tokens * shape.layers * shape.hidden * heads * shape.head_dim,
        "scores": 12 * shape.heads * shape.head_dim * seen,
        "ffn": 6 * tokens * shape.layers * 3 * shape.hidden * shape.ffn,
        "head": 6 * tokens * shape.hidden * shape.vocab_size,
    }


def pairs(length: int, window: int | None, causal: bool) -> int:
    """Pairs of a query and a key of one document that meet, where a query sees at most ``window`` keys."""
    early = length if window is None else min(length, window)
    if not causal:
        return length * early
    return early * (early + 1) // 2 + (length - early) * early


def mfu(flops: float, seconds: float, ranks: int, peak_flops: float | None) -> float | None:
    """The share of ``ranks`` machines' peak that ``flops`` in ``seconds`` are; None where no peak is known."""
    return None if peak_flops is None else flops / (seconds * ranks * peak_flops)
