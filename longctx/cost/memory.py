"""Memory of a GPU in bytes, by part: weights, gradients, optimizer, activations, logits, KV cache, buffers.

The formulas leave out fragmentation, the memory of CUDA and NCCL, and norms and biases (below 0.1 % of the weights).
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

    Only one layer's activations exist at a time: those of attention or of the feed-forward network, whichever are
    larger.  Attention has queries, keys, values and a float32 partial.  The feed-forward network has gate, up and their
    product.  Both have the residual stream and its norm.  Only the last row of each sequence has logits.
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

    Per row and layer, these elements of e bytes are kept for the backward:

        4 H         inputs and outputs of both norms
        2 H_Q D     queries, and the output of attention
        2 H_KV D    keys and values
        3 F         gate, up and their product (2 F without a gate)

    The float32 output of attention (H_Q D) is kept too.  Sequence parallelism divides all of these by tp.  Selective
    recomputation does not keep the 3 F.  Full recomputation keeps only the layer's input and the float32 output of
    attention.  The first of S pipeline stages holds the activations of min(S, micro-batches) micro-batches.
    """
    weights, replicas = stage_weights(shape, mesh), mesh.dp * mesh.ulysses * mesh.ring
    e, heads, keys = numbers.element, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    states = 12 if e < 4 else 8  # two float32 moments; with 16-bit weights also a float32 copy
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
