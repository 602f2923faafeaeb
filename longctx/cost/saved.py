"""Bytes per row that the forward of a decoder layer keeps for the backward, by piece.

A row is a token on one rank.  H is the hidden size, divided by tp (sequence parallelism).  Q and K are a rank's query
and KV heads times their dimension.  F is a rank's FFN size, e the bytes of a number, and k the experts per token.
"""

from typing import NamedTuple

from longctx.cost.forward import Numbers
from longctx.cost.machine import Degrees
from longctx.cost.step import StepWork
from longctx.cost.training import Decoder


class Saved(NamedTuple):
    """Bytes per row that a layer keeps.

    ``stream`` is the residual stream, H e bytes.  Attention and the feed-forward network each have the same norms:

        norm_in      before the block: the norm's input and output; without a norm, the block's input
        norm_out     after the block: the norm's input
        final_norm   the norm after the last layer: its input and output
        qkv          queries, keys and values after rotation, and attention's output: (2 Q + 2 K) e.  Without Ulysses,
                     longctx's values are views of the projection's output, which adds (Q + K) e.  With 16 bits, also
                     16-bit cosines and sines.
        qk_norm      inputs of the norms of queries and keys
        partial      the float32 output of attention, and a log-sum-exp for each of q heads: 4 (Q + q).  Megatron's
                     attention keeps the output once, in 16 bits: 4 q.
        ffn          of a layer without experts: gate, up, activated gate and product, 4 F e; 3 F e if fused, 2 F e
                     without a gate
        experts      of a layer with experts: each chosen expert keeps two more numbers per neuron than a dense network,
                     one more for a clamped gate, one more for a sigmoid, and a copy of the row with its full hidden
                     size H tp: k (6 F + H tp) e
        inputs       what a micro-batch has for all layers together: tokens, targets, masks, cosines and sines
    """

    stream: float
    norm_in: float
    norm_out: float
    final_norm: float
    qkv: float
    qk_norm: float
    partial: float
    ffn: float
    experts: float
    inputs: float


def saved_bytes(shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers) -> Saved:
    """Return the bytes per row that a layer of ``shape`` keeps for the backward, by piece, with ``work.operations``."""
    e, hidden = numbers.element, shape.hidden / mesh.tp
    own_layers = {"fused": 0, "cuda": 1, "cpu": 1}[work.operations]
    # 1. Norms.  Per number of the input: its bytes, and on a CPU the float32 quotient that the weight multiplies.
    norm = _norm_input(shape, work, e)
    quotient = 0 if shape.layer_norm or work.operations != "cpu" else 4
    before, after = norm + quotient + e, norm + quotient
    # 2. Attention.  The queries of several KV heads are copied, out of the projection's output.
    own_kv_heads = max(1, shape.kv_heads / mesh.tp)
    queries = shape.heads / mesh.tp * shape.head_dim
    keys = max(own_kv_heads, mesh.ulysses) * shape.head_dim
    views = own_layers * (queries + keys) if mesh.ulysses == 1 else 0.0
    rotated = [2 * len(rotary.frequencies) if rotary else 0 for rotary in shape.rotaries]
    tables = 4 * e * sum(rotated) / shape.layers if own_layers and e < 4 else 0.0  # queries and keys
    # 3. Feed-forward networks.
    tensors = 3 + own_layers if shape.gated else 2
    experts = 0.0
    if shape.mixture:
        numbers_per_neuron = tensors + 2 + (shape.glu_limit is not None) + (shape.activation == "gelu_sigmoid")
        of_one = numbers_per_neuron * shape.mixture.ffn / mesh.tp + shape.hidden
        experts = shape.mixture.per_token * of_one
    return Saved(
        stream=hidden * e,
        norm_in=hidden * (before if shape.norms != "post" else e),
        norm_out=hidden * (after if shape.norms != "pre" else 0),
        final_norm=hidden * before,
        qkv=(2 * queries + 2 * keys + views) * e + tables,
        qk_norm=_qk_norm(shape, mesh, work, e),
        partial=4 * (shape.heads / mesh.tp + own_layers * queries),
        ffn=tensors * shape.ffn / mesh.tp * e,
        experts=experts * e,
        inputs=_INPUT_BYTES + rotary_bytes(shape),
    )


_INPUT_BYTES = 28  # a row's token, target and bucket in 64 bits, its mask in 32


def rotary_bytes(shape: Decoder) -> float:
    """Return the bytes per row of float32 cosines and sines; layers with equal rotary embeddings share them."""
    return 8.0 * sum(2 * len(rotary.frequencies) for rotary in {*shape.rotaries} if rotary)


def _norm_input(shape: Decoder, work: StepWork, element: int) -> int:
    """Return the bytes per number that a norm keeps of its input: those of a float32 copy where it makes one.

    torch's RMSNorm copies 16-bit numbers on a CPU; longctx's does everywhere if its weights are zero-centered.
    """
    copies = not shape.layer_norm and (shape.zero_centered or work.operations == "cpu")
    return 4 if copies else element


def _qk_norm(shape: Decoder, mesh: Degrees, work: StepWork, element: int) -> float:
    """Return the bytes per row that the norms of queries and keys keep.

    Their inputs are a copy of the queries, which only one KV head's queries do not need, and keys that are views of the
    projection's output.  Without Ulysses, the values keep this output anyway.  With float32 copies of 16-bit inputs,
    neither is needed.  A norm over all heads (`RMSNormOverHeads`) makes such copies on any device, and keeps quotients
    in the model's dtype.
    """
    if shape.qk_norm == "none":
        return 0.0
    kv_heads, heads = max(1, shape.kv_heads / mesh.tp), shape.heads / mesh.tp
    both = (heads + kv_heads) * shape.head_dim
    if shape.qk_norm == "width":
        quotient, copy = float(element * both), 4
    else:
        quotient, copy = 4 * both if work.operations == "cpu" else 0.0, _norm_input(shape, work, element)
    if copy > element:
        return quotient + copy * both
    copied = heads * shape.head_dim if 1 < kv_heads < heads else 0.0
    whole = (heads + 2 * kv_heads) * shape.head_dim if mesh.ulysses > 1 else 0.0
    return quotient + (copied + whole) * element
