"""Memory of a GPU in bytes, by part: weights, gradients, optimizer, activations, logits, KV cache, buffers.

The formulas leave out fragmentation, the memory of CUDA and NCCL, and weights of norms and biases (below 0.1 %).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from longctx.cost.attention import Work
from longctx.cost.decode import SHARED_ROWS
from longctx.cost.forward import Numbers, layer_weights, ring_works
from longctx.cost.machine import Degrees
from longctx.cost.saved import Saved, rotary_bytes, saved_bytes
from longctx.cost.step import StepWork, stage_weights, weights_by_replicas
from longctx.cost.training import Decoder


def inference_bytes(
    shape: Decoder, mesh: Degrees, new: Sequence[int], cached: Sequence[int], strategy: str, numbers: Numbers
) -> dict[str, float]:
    """Return a rank's bytes, by part, at the peak of a pass over ``new`` tokens of each sequence after ``cached`` ones.

    The parts are "weights", "kv_cache", "activations", "logits" and "communication".

    The peak is in the last layer, or at the logits.  Only one layer's activations exist at a time: those of attention
    or of the feed-forward network, whichever are larger.  Both have the embedding's output, the layer's input, and
    float32 cosines and sines.  Attention has the projection's output, queries and keys after rotation, an output, and
    two float32 partials: the total, and the tile that is merged into it.  It also has normalised queries and keys, or a
    copy of the queries of several KV heads.  The feed-forward network has the residual stream, a norm's output, gate,
    up, their product and the output, and the output after a norm or a scale.

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
    always = e * 2 * shape.hidden + rotary_bytes(shape)
    feed_forward = e * (3 * shape.hidden + (2 + shape.gated) * shape.ffn / mesh.tp) + _changed_output(shape, e)
    copied = heads if 1 < shape.kv_heads / mesh.tp < shape.heads / mesh.tp else 0.0
    before_rotation = copied if shape.qk_norm == "none" else heads + keys
    attention = e * (3 * heads + 3 * keys + before_rotation) + 8 * (heads + shape.heads / mesh.tp)
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


def _changed_output(shape: Decoder, element: int) -> float:
    """Return the bytes per row of an output that a norm or a scale has changed, beside the output itself.

    A zero-centered norm of 16-bit numbers has its input and its result in float32.
    """
    if shape.norms != "pre":
        return shape.hidden * (8.0 if shape.zero_centered and element < 4 else element)
    return shape.hidden * element * float(shape.residual_scale != 1)


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
    for the backward also exist (`saved_bytes`), unless they are offloaded; then the peak may also be in the forward of
    a feed-forward network.  Stage s of S pipeline stages has those of min(S - s, micro-batches) micro-batches; only the
    last stage computes a loss.  The stage that needs most counts, with the weights of an average stage.

    At the loss, c rows of float32 logits (with 16-bit weights also the 16-bit ones) exist, and the gradients of the
    hidden states and, in float32, of the output weight.  A tied weight's gradient stays until the embedding's gradient
    is added at the end of the backward.  For AdamW's denominator, the update makes two temporaries as large as the
    embedding, the largest weight.

    Experts on different ranks are assumed to get equally many rows.  If they do not, the rank with the most rows needs
    more.

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


class _Layer(NamedTuple):
    """Bytes of a layer.

    ``saved`` is what the layer keeps in memory from the forward to the backward.  When the backward reaches the gate,
    the layer has ``gate``; when it reaches attention, ``attention``.  In the forward of the feed-forward network, the
    network has ``forward``.
    """

    saved: float
    gate: float
    attention: float
    forward: float


class _Network(NamedTuple):
    """Bytes of a feed-forward network: kept for the backward, at the gate in the backward, and in the forward."""

    saved: float
    gate: float
    forward: float


def _layer(
    shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers, pieces: Saved, rows: float, *, mixed: bool
) -> _Layer:
    """Return the bytes of a layer's ``rows`` rows with ``work.recompute`` and ``work.offload``.

    The layer has experts if ``mixed``.  The backward frees the output norm's input before it reaches the gate, and the
    output projection's input before attention.
    """
    once = 2 * pieces.norm_in + pieces.norm_out + pieces.qkv + pieces.qk_norm + pieces.partial
    saved_once = pieces.stream + pieces.partial if work.recompute == "full" else once
    rest = once - saved_once if work.offload else once
    queries = shape.heads / mesh.tp * shape.head_dim * numbers.element
    network = (_experts if mixed else _dense)(shape, mesh, work, numbers, pieces, rows)
    return _Layer(
        saved=0.0 if work.offload else rows * saved_once + network.saved,
        gate=rows * rest + network.gate,
        attention=rows * max(0.0, rest - pieces.norm_in - pieces.norm_out - queries),
        forward=network.forward,
    )


def _dense(shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers, pieces: Saved, rows: float) -> _Network:
    """Return the bytes of a feed-forward network without experts, with the norm of its output.

    In the backward, the product is freed, and the gate's output and its two inputs have gradients.  If the network's
    activations are offloaded, there are four gradients: of the gate, of its other input, and of both in one tensor.
    With tensor parallelism, the gradient of all rows' outputs may be larger.
    """
    tile, width = min(rows, work.mlp_rows or rows), shape.ffn / mesh.tp * numbers.element
    saves = not work.mlp_rows and work.recompute == "none"
    gradients = max((1 + shape.gated) * width, width + shape.hidden * numbers.element * (mesh.tp > 1))
    gate = (2 + 2 * shape.gated) * width if work.offload and saves else pieces.ffn + gradients
    return _Network(rows * (pieces.ffn + pieces.norm_out) * saves, tile * gate, tile * pieces.ffn)


def _experts(shape: Decoder, mesh: Degrees, work: StepWork, numbers: Numbers, pieces: Saved, rows: float) -> _Network:
    """Return the bytes of a layer's experts, which `mlp_rows` and selective recomputation do not change.

    They run one after the other, so that one expert's gradients exist at a time, with those of all outputs.  In the
    forward, the outputs exist once more, in one tensor.
    """
    assert shape.mixture
    outputs = shape.mixture.per_token * shape.hidden * numbers.element
    one = shape.mixture.ffn / mesh.tp * numbers.element * shape.mixture.per_token / shape.mixture.count * mesh.ep
    gate = pieces.experts + max((1 + shape.gated) * one + outputs, 2 * outputs)
    if work.offload and work.recompute != "full":
        gate = (2 + 2 * shape.gated) * one + outputs
    return _Network(rows * pieces.experts * (work.recompute != "full"), rows * gate, rows * pieces.experts)


def _pass_moments(
    shape: Decoder, mesh: Degrees, work: StepWork, strategy: str, numbers: Numbers
) -> Iterator[dict[str, float]]:
    """Yield the bytes of activations, logits and buffers at moments of a pass, on the stages that need most of them.

    Stage s of S has min(S - s, micro-batches) of them in memory, so that of stages with equal layers the first needs
    most.  The last stage has the logits.
    """
    size, every = shape.layers // mesh.pp, [experts is not None for experts in shape.experts]
    stages = [every[stage * size : (stage + 1) * size] for stage in range(mesh.pp)]
    for stage, kinds in enumerate(stages):
        last = stage == mesh.pp - 1
        if last or kinds not in stages[:stage]:
            micro = min(mesh.pp - stage, work.batch / (mesh.dp * work.sequences))
            yield from _stage_moments(shape, mesh, work, strategy, numbers, _Stage(kinds, micro, last))


class _Stage(NamedTuple):
    """A pipeline stage: for each layer, whether it has experts; the micro-batches in memory; and if it is the last."""

    kinds: list[bool]
    micro: float
    last: bool


def _stage_moments(
    shape: Decoder, mesh: Degrees, work: StepWork, strategy: str, numbers: Numbers, stage: _Stage
) -> Iterator[dict[str, float]]:
    """Yield the bytes of activations, logits and buffers at the loss, in the last layer's backward, and after it.

    In the last layer, the backward of the feed-forward network comes first.  The backward of attention follows, after
    the network's activations are freed.  The gradient of the residual stream exists throughout.  With recomputation,
    the layer's output exists too, and later the first gradient of it.

    With offload, what a layer keeps for its backward is not in memory; the formula also leaves out tensors of less than
    64 KB, which stay.  The peak may then be in the forward of a feed-forward network.
    """
    # 1. Rows of a rank; layers and micro-batches.
    pieces, hidden = saved_bytes(shape, mesh, work, numbers), shape.hidden * numbers.element
    rows = work.length * work.sequences / (mesh.ulysses * mesh.ring)
    (kinds, micro, is_last), stream = stage, rows * pieces.stream
    layer = {mixed: _layer(shape, mesh, work, numbers, pieces, rows, mixed=mixed) for mixed in {*kinds}}
    saved = sum(layer[mixed].saved for mixed in kinds)
    inputs = micro * rows * pieces.inputs
    gathered = rows * hidden if mesh.tp > 1 else 0.0  # sequence parallelism: all rows, for one projection
    # 2. The loss.
    weight = 0.0 if work.operations == "fused" else shape.vocab_size * shape.hidden / mesh.tp
    logits = min(rows, work.loss_rows or rows) * shape.vocab_size / mesh.tp * (4 + numbers.element % 4)
    if is_last:
        last = saved + rows * (pieces.inputs + pieces.final_norm) + gathered
        yield {"activations": last, "logits": logits + weight * 4 + rows * hidden, "communication": gathered}
    if work.offload:
        activations = inputs + 3 * stream + max(kind.forward for kind in layer.values()) + gathered
        yield {"activations": activations, "logits": 0.0, "communication": gathered}
    # 3. The backward of the last layer of each kind, with or without experts: its gate, then its attention.
    waiting = weight * numbers.element if shape.tied and mesh.pp == 1 else 0.0
    output = stream if work.recompute == "full" else 0.0
    new, cached = [work.length] * work.sequences, [0] * work.sequences
    works = [one for one, _ in ring_works(shape, mesh, new, cached, numbers)]
    buffers = gathered + max(max(_buffers(one, strategy), _backward_buffers(one)) for one in works)
    for mixed, one in layer.items():
        earlier = kinds[: len(kinds) - 1 - kinds[::-1].index(mixed)]
        others = inputs + (micro - 1) * saved + sum(layer[kind].saved for kind in earlier) + stream + output
        yield {"activations": others + one.gate, "logits": waiting, "communication": gathered}
        activations = others + one.attention + output + _attention_gradients(works[0])
        yield {"activations": activations, "logits": waiting, "communication": buffers}
    # 4. The end of the backward: the embedding's gradient, and its sum with the gradient of the tied weight.
    yield {"activations": inputs + weight * numbers.element + waiting, "logits": waiting, "communication": gathered}


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
