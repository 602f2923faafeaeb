"""Memory of a GPU in bytes, by part: weights, gradients, optimizer, activations, logits, KV cache, buffers.

The formulas leave out fragmentation, the memory of CUDA and NCCL, and norms and biases (below 0.1 % of the weights).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from longctx.cost.attention import Work
from longctx.cost.decode import SHARED_ROWS
from longctx.cost.experts import expert_layers
from longctx.cost.forward import Numbers, layer_weights, ring_works
from longctx.cost.machine import Degrees
from longctx.cost.step import StepWork, stage_weights, weights_by_replicas
from longctx.cost.training import Decoder


def inference_bytes(
    shape: Decoder, mesh: Degrees, new: Sequence[int], cached: Sequence[int], strategy: str, numbers: Numbers
) -> dict[str, float]:
    """Return a rank's bytes, by part, at the peak of a pass over ``new`` tokens of each sequence after ``cached`` ones.

    The parts are "weights", "kv_cache", "activations", "logits" and "communication".

    The peak is in the last layer, or at the logits.  Only one layer's activations exist at a time: those of attention
    or of the feed-forward network, whichever are larger.  Both have the embedding's output, the layer's input, a norm's
    output, and float32 cosines and sines.  Attention has the projection's output, queries and keys after rotation, an
    output, and two float32 partials: the total, and the tile that is merged into it.  The feed-forward network has the
    residual stream, gate, up, their product and the output.

    Only the last row of each sequence has logits: a rank's shard, and the whole row that it gathers.  With
    ``gather_merge``, each context rank computes the logits of some sequences.  Pass-KV, pass-Q and all-gather copy one
    layer's keys and values of several sequences into one tensor.  Pass-Q packs a partial for each rank.  With
    ``sharded``, a rank sums hidden states itself, and first gathers every rank's part.  Windows do not shrink the
    cache: a session keeps all rows of every layer.  Workspace inside a kernel is left out, such as the float32 copies
    of 16-bit inputs on a CPU.

    Raises ValueError for an unknown strategy.
    """
    _, ffn = layer_weights(shape)
    cheaper = ffn * shape.layers * (numbers.element - numbers.ffn) / mesh.tp
    e, heads = numbers.element, shape.heads * shape.head_dim / mesh.tp
    keys = max(1, shape.kv_heads / mesh.tp) * shape.head_dim
    always = e * 2 * shape.hidden + 8 * shape.head_dim
    feed_forward = e * (3 * shape.hidden + (2 + shape.gated) * shape.ffn / mesh.tp)
    attention = e * (shape.hidden + 3 * heads + 3 * keys) + 8 * heads
    rows = sum(new) if strategy in SHARED_ROWS else sum(new) / (mesh.ulysses * mesh.ring)
    fixed = {"weights": stage_weights(shape, mesh) * e - cheaper, "kv_cache": 0.0}
    buffers = copied = packed = 0.0
    for work, layers in ring_works(shape, mesh, new, cached, numbers):
        fixed["kv_cache"] += layers * work.kv_block_bytes
        buffers = max(buffers, _buffers(work, strategy))
        copied = max(copied, work.kv_block_bytes if len(new) > 1 and strategy not in SHARED_ROWS else 0.0)
        packed = buffers if strategy == "pass_q" else 0.0
    summed = rows * e * shape.hidden * mesh.tp * mesh.ulysses * mesh.ring if strategy == "sharded" else 0.0
    logit_rows = math.ceil(len(new) / (mesh.ulysses * mesh.ring)) if strategy == "gather_merge" else len(new)
    logits = logit_rows * shape.vocab_size * (1 + 1 / mesh.tp) * max(e, 4.0)
    moments = (
        {"activations": rows * (always + feed_forward), "logits": 0.0, "communication": summed},
        {"activations": rows * (always + attention) + copied + packed, "logits": 0.0, "communication": buffers},
        {"activations": rows * e * 2 * shape.hidden, "logits": logits, "communication": 0.0},
    )
    return fixed | max(moments, key=lambda parts: sum(parts.values()))


def _buffers(work: Work, strategy: str) -> float:
    """Return the bytes of messages and buffers that exist at once in one layer's attention by ``strategy``.

    Under a window, only the rows within it count.  The buffers are two blocks of a ring (`pass_kv`, the backward), the
    blocks of all ranks and this rank's packed block (`all_gather_kv`), or a partial of each rank (other strategies).
    """
    reach, block = work.reach, work.kv_block_bytes
    partials = (work.new_total / work.ranks + reach.q_rows) * work.partial_row_bytes
    in_flight = {
        "pass_kv": 2 * max(reach.kv_hops, default=0.0) * work.kv_row_bytes,
        "pass_q": partials,
        "all_gather_kv": 2 * block + reach.kv_rows * work.kv_row_bytes,
        "gather_merge": work.partial_bytes * work.ranks,
        "sharded": work.partial_bytes * work.ranks / max(1, work.ranks - 1),
    }
    if strategy not in in_flight:
        raise ValueError(f"strategy={strategy} has no formula: use {', '.join(in_flight)}")
    return in_flight[strategy] if work.ranks > 1 else 0.0


def step_bytes(shape: Decoder, mesh: Degrees, work: StepWork, strategy: str, numbers: Numbers) -> dict[str, float]:
    """Return a rank's bytes, by part, at the peak of a training step.

    The parts are "weights", "gradients", "optimizer", "activations", "logits" and "communication".

    The peak is at one of these points: the loss, the backward of a layer's feed-forward network, the backward of its
    attention, the backward of the embedding, or the update.  At the first three, the activations that the forward keeps
    for the backward also exist (`_saved`), unless they are offloaded; then the peak may also be in the forward of a
    feed-forward network.  The first of S pipeline stages has those of min(S, micro-batches) micro-batches; only the
    last stage computes a loss.

    At the loss, c rows of float32 logits (with 16-bit weights also the 16-bit ones) exist, and the gradients of the
    hidden states and, in float32, of the output weight.  A tied weight's gradient stays until the embedding's gradient
    is added at the end of the backward.  For AdamW's denominator, the update makes two temporaries as large as the
    embedding, the largest weight.

    Raises ValueError for numbers of other sizes than 2 and 4 bytes, and for an unknown strategy.
    """
    if numbers.element not in (2, 4):
        raise ValueError(f"the memory of training with numbers of {numbers.element} bytes has no formula: use 2 or 4")
    weights, replicas = stage_weights(shape, mesh), mesh.dp * mesh.ulysses * mesh.ring
    sharded = sum(some / same for same, some in weights_by_replicas(shape, mesh).items())
    states = 12 if numbers.element < 4 else 8  # two float32 moments; with 16-bit weights also a float32 copy
    optimizer = states * (sharded if work.zero1 else weights)
    embedding = shape.vocab_size * shape.hidden / mesh.tp
    fixed = {"weights": weights * numbers.element, "gradients": weights * 4.0, "optimizer": optimizer}
    shard = min(embedding, weights / replicas) if work.zero1 else embedding
    moments = [*_pass_moments(shape, mesh, work, strategy, numbers), {"optimizer": optimizer + 2 * shard * 4}]
    empty = dict.fromkeys(("activations", "logits", "communication"), 0.0)
    return max(({**fixed, **empty, **moment} for moment in moments), key=lambda parts: sum(parts.values()))


def _saved(shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers) -> dict[str, float]:
    """Return the bytes that a layer's forward keeps per row, by piece.

    H is the hidden size, divided by tp (sequence parallelism).  Q and K are a rank's query and KV heads times their
    dimension.  F is a rank's FFN size, and e the bytes of a number.

        stream       2 H e        the inputs of both norms
        norms        2 H e        their outputs; on a CPU also 8 H, the float32 rows that the weight multiplies
        qkv          (2 Q + 2 K) e  queries, keys and values after rotation, and the output of attention.  Without
                     Ulysses, longctx's values are views of the projection's output, which adds (Q + K) e.
        partial      4 (Q + q)    the float32 output of attention, and a log-sum-exp for each of q heads.  Megatron's
                     attention keeps the output once, in 16 bits: 4 q.
        ffn          4 F e        gate, up, activated gate and product; 3 F e if fused, 2 F e without a gate
        experts      k (6 F e + 2 H e + e times the full hidden size): each of k chosen experts keeps two more numbers
                     per neuron than a dense network, copies the row, and has two outputs.  The counts fit one rank and
                     tp = 2 of Mixtral and Qwen3.  If ranks divide the experts, the formula assumes that all ranks get
                     equally many rows.
    """
    e, hidden = numbers.element, shape.hidden / mesh.tp
    own_layers = {"fused": 0, "cuda": 1, "cpu": 1}[work.operations]
    heads, tensors = shape.heads / mesh.tp, 3 + own_layers if shape.gated else 2
    mixed, experts = expert_layers(shape) / shape.layers, 0.0
    if shape.mixture:
        of_one = (tensors + 2) * shape.mixture.ffn / mesh.tp + shape.hidden + 2 * hidden
        experts = mixed * shape.mixture.per_token * of_one
    kv_heads = max(1, shape.kv_heads / mesh.tp, mesh.ulysses)
    queries, keys = heads * shape.head_dim, kv_heads * shape.head_dim
    views = own_layers * (queries + keys) if mesh.ulysses == 1 else 0
    return {
        "stream": 2 * hidden * e,
        "norms": 2 * hidden * e + {"fused": 0, "cuda": 0, "cpu": 8 * hidden}[work.operations],
        "qkv": (2 * queries + 2 * keys + views) * e,
        "partial": 4 * (heads + own_layers * queries),
        "ffn": (1 - mixed) * tensors * shape.ffn / mesh.tp * e,
        "experts": experts * e,
    }


class _Layer(NamedTuple):
    """Bytes per row of a layer.

    ``stream`` is the residual stream, and ``norm`` what one norm keeps.  ``saved`` is what the layer keeps in memory
    from the forward to the backward.  In the forward, its feed-forward network has ``ffn``.  When the backward reaches
    the gate, the network has ``network``, and the rest of the layer ``rest``.
    """

    stream: float
    norm: float
    saved: float
    ffn: float
    network: float
    rest: float


def _layer(shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers) -> _Layer:
    """Return the bytes of a layer with ``work.recompute`` and ``work.offload``.

    In the backward, the gate's output and its two inputs have gradients, and the product is freed.  If the network's
    activations are offloaded, there are four gradients: of the gate, of its other input, and of both in one tensor.
    """
    pieces = _saved(shape, mesh, work, numbers)
    ffn, stream = pieces["ffn"] + pieces["experts"], pieces["stream"] / 2
    rest = sum(pieces.values()) - ffn
    saved_ffn = {"none": 0.0 if work.mlp_rows else ffn, "selective": pieces["experts"], "full": 0.0}[work.recompute]
    saved_rest = stream + pieces["partial"] if work.recompute == "full" else rest
    # Experts run one after the other, so that one expert's gradients exist at a time.
    width: float = shape.ffn
    if shape.mixture:
        width = shape.mixture.ffn * shape.mixture.per_token / shape.mixture.count * mesh.ep
    width *= numbers.element / mesh.tp
    offloaded = work.offload and saved_ffn == ffn
    return _Layer(
        stream,
        norm=(pieces["stream"] + pieces["norms"]) / 2,
        saved=0.0 if work.offload else saved_ffn + saved_rest,
        ffn=ffn,
        network=(2 + 2 * shape.gated) * width if offloaded else ffn + 2 * width,
        rest=rest - saved_rest if work.offload else rest,
    )


def _pass_moments(
    shape: Decoder, mesh: Degrees, work: StepWork, strategy: str, numbers: Numbers
) -> Iterator[dict[str, float]]:
    """Yield the bytes of activations, logits and buffers at the loss, in the last layer's backward, and after it.

    In the last layer, the backward of the feed-forward network comes first.  The backward of attention follows, after
    the network's activations are freed.  The gradient of the residual stream exists throughout.  With recomputation,
    the layer's output exists too, and later the first gradient of it.

    With offload, what a layer keeps for its backward is not in memory; the formula also leaves out tensors of less than
    64 KB, which stay.  The peak may then be in the forward of a feed-forward network.
    """
    # 1. Bytes per row; rows of a rank, and of a tile of its feed-forward networks; layers of a stage; micro-batches of
    # the first stage.
    layer, hidden = _layer(shape, mesh, work, numbers), shape.hidden * numbers.element
    rows = work.length * work.sequences / (mesh.ulysses * mesh.ring)
    tile = min(rows, work.mlp_rows or rows)
    layers, micro = shape.layers / mesh.pp, min(mesh.pp, work.batch / (mesh.dp * work.sequences))
    others = (micro * layers - 1) * rows * layer.saved
    gathered = rows * hidden if mesh.tp > 1 else 0.0  # sequence parallelism: all rows, for one projection
    # 2. The loss, on the last stage.
    weight = 0.0 if work.operations == "fused" else shape.vocab_size * shape.hidden / mesh.tp
    logits = min(rows, work.loss_rows or rows) * shape.vocab_size / mesh.tp * (4 + numbers.element % 4)
    last = layers * rows * layer.saved + rows * layer.norm + gathered
    yield {"activations": last, "logits": logits + weight * 4 + rows * hidden, "communication": gathered}
    if work.offload:
        activations = 3 * rows * layer.stream + tile * layer.ffn + gathered
        yield {"activations": activations, "logits": 0.0, "communication": gathered}
    # 3. The last layer's gate.
    waiting = weight * numbers.element if shape.tied and mesh.pp == 1 else 0.0
    output = rows * layer.stream if work.recompute == "full" else 0.0
    activations = others + rows * (layer.rest + layer.stream) + tile * layer.network + output + gathered
    yield {"activations": activations, "logits": waiting, "communication": gathered}
    # 4. Its attention.
    new, cached = [work.length] * work.sequences, [0] * work.sequences
    works = [one for one, _ in ring_works(shape, mesh, new, cached, numbers)]
    projected = rows * shape.heads / mesh.tp * shape.head_dim * numbers.element  # the output projection's input: free
    needed = rows * (layer.rest - layer.norm) - projected if work.recompute == "full" or not work.offload else 0.0
    activations = others + needed + rows * layer.stream + 2 * output + _attention_gradients(works[0]) + gathered
    buffers = gathered + max(max(_buffers(one, strategy), _backward_buffers(one)) for one in works)
    yield {"activations": activations, "logits": waiting, "communication": buffers}
    # 5. The end of the backward: the embedding's gradient, and its sum with the gradient of the tied weight.
    yield {"activations": weight * numbers.element + waiting, "logits": waiting, "communication": gathered}


def _backward_buffers(work: Work) -> float:
    """Return the bytes in flight in the backward of one layer's attention.

    These are keys and values, and the float32 sums of their gradients.
    """
    sums = max(work.reach.sum_hops, default=0.0) * work.kv_row_bytes * 4 / work.element_bytes
    return _buffers(work, "pass_kv") + sums


def _attention_gradients(work: Work) -> float:
    """Return the bytes of gradients at the point where a block's gradients are added to the sums over blocks.

    These are the gradient of the output, in the dtype of the model, and three parts in float32: the sum of the queries'
    gradients over blocks, one block's gradients of queries, keys and values, and the kernel's gradients of queries,
    keys and values for one tile, which is counted as large as a block.
    """
    queries = work.q_block_bytes / work.element_bytes
    keys_and_values = work.kv_block_bytes / work.element_bytes
    return work.q_block_bytes + 4 * (3 * queries + 2 * keys_and_values)
