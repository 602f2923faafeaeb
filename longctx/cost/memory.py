"""Bytes of a GPU by part: weights, gradients, optimizer, activations, logits, KV cache, communication buffers.

Fragmentation and the memory of CUDA and NCCL are left out.  Norms and biases, below 0.1 % of the weights, are too.
"""

from collections.abc import Sequence

from longctx.cost.attention import Work
from longctx.cost.forward import Numbers, layer_weights, ring_works
from longctx.cost.machine import Degrees
from longctx.cost.step import StepWork, stage_weights
from longctx.cost.training import Decoder


def inference_bytes(
    shape: Decoder, mesh: Degrees, new: Sequence[int], cached: Sequence[int], strategy: str, numbers: Numbers
) -> dict[str, float]:
    """Return the bytes of a pass over ``new`` tokens after ``cached`` ones, by part.

    A layer's activations live until the next layer's.  The largest set is that of the feed-forward network (the
    residual stream, its norm, gate, up and their product), or of attention (queries, keys, values, and a float32
    partial).  Logits are those of each sequence's last row.
    """
    _, ffn = layer_weights(shape)
    cheaper = ffn * shape.layers * (numbers.element - numbers.ffn) / mesh.tp
    rows = sum(new) / (mesh.ulysses * mesh.ring)
    e, heads = numbers.element, shape.heads * shape.head_dim / mesh.tp
    keys = max(1, shape.kv_heads / mesh.tp) * shape.head_dim
    feed_forward = e * (2 * shape.hidden + (2 + shape.gated) * shape.ffn / mesh.tp)
    attention = e * (2 * shape.hidden + 2 * heads + 2 * keys) + 4 * heads
    parts = {
        "weights": stage_weights(shape, mesh) * e - cheaper,
        "activations": rows * max(feed_forward, attention),
        "logits": len(new) * shape.vocab_size / mesh.tp * 4.0,
        "kv_cache": 0.0,
        "communication": 0.0,
    }
    for work, layers in ring_works(shape, mesh, new, cached, numbers):
        parts["kv_cache"] += layers * work.kv_block_bytes
        parts["communication"] = max(parts["communication"], _buffers(work, strategy))
    return parts


def _buffers(work: Work, strategy: str) -> float:
    """Return the bytes in flight for one layer: two blocks of a ring, all gathered blocks, or all partial outputs."""
    if work.ranks == 1:
        return 0.0
    if strategy == "all_gather_kv":
        return work.ranks * work.kv_block_bytes
    if strategy == "pass_q":
        return 2 * work.q_block_bytes + 2 * work.partial_bytes
    return 2 * work.kv_block_bytes if strategy == "pass_kv" else work.partial_bytes * work.ranks


def step_bytes(shape: Decoder, mesh: Degrees, work: StepWork, strategy: str, numbers: Numbers) -> dict[str, float]:
    """Return the bytes of a training step by part.

    Per row and layer, the backward keeps the inputs of both norms and their outputs (4 H), queries and attention's
    output (2 H_Q D), keys and values (2 H_KV D), gate, up and their product (3 F), each of e bytes, and attention's
    float32 output (H_Q D).  Sequence parallelism divides all by tp.  Selective recomputation drops 3 F; full keeps the
    layer's input and attention's output.  The first of S stages holds min(S, micro-batches) micro-batches.
    """
    weights, replicas = stage_weights(shape, mesh), mesh.dp * mesh.ulysses * mesh.ring
    e, heads, keys = numbers.element, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    states = 12 if e < 4 else 8  # float32 moments; beside 16-bit weights, a float32 copy
    row = e * (4 * shape.hidden + 2 * heads + 2 * keys) + 4 * heads
    row += e * (2 + shape.gated) * shape.ffn if work.recompute == "none" else 0
    if work.recompute == "full":
        row = e * shape.hidden + 4 * heads
    rows = work.length * work.sequences / (mesh.ulysses * mesh.ring)
    micro = min(mesh.pp, work.batch / (mesh.dp * work.sequences))
    new, cached = [work.length] * work.sequences, [0] * work.sequences
    buffers = max(_buffers(one, strategy) for one, _ in ring_works(shape, mesh, new, cached, numbers))
    return {
        "weights": weights * e,
        "gradients": weights * 4.0,
        "optimizer": weights * states / (replicas if work.zero1 else 1),
        "activations": micro * rows * row * shape.layers / mesh.pp / mesh.tp,
        "logits": rows * shape.vocab_size / mesh.tp * (e + 4.0),
        "communication": buffers,
    }
