"""Seconds and bytes of a training step, from the same formulas as a forward pass.

Per micro-batch (a sequence) and layer, a rank with s / (U R) rows computes

    products   GEMMs, 3 times the forward's: one each for the output, the weights' gradient and the input's gradient;
               a machine with measured `TrainRates` has its own factor, and its own time for each weight
    attention  the forward, and `longctx.cost.attention.backward_cost`
    Ulysses    two all-to-alls in the forward, and two in the backward
    tp         with sequence parallelism 6 all-gathers and 4 reduce-scatters (arXiv 2405.07719, v5, Table 2); each
               moves half the bytes of an all-reduce, so these 10 count as 5 all-reduces
    ep         the exchanges of `longctx.cost.experts`; in layers with experts they replace half of the tp collectives

Once per step, gradients are reduced in float32 over data- and context-parallel ranks.  ZeRO-1 uses a reduce-scatter of
gradients and an all-gather of the new weights instead.  A pipeline of S stages is idle for the time of S - 1
micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from longctx.cost.attention import (
    COSTS,
    Work,
    backward_cost,
    block_seconds,
    start_seconds,
    ulysses_bytes,
    ulysses_seconds,
)
from longctx.cost.experts import dense_ffn_weights, expert_layers, expert_weights, experts_cost
from longctx.cost.forward import Numbers, PassCost, layer_reductions, layer_weights, ring_works
from longctx.cost.machine import Degrees, Machine
from longctx.cost.training import Decoder

_UPDATE_BYTES = 28  # float32: reads gradient, weight and two moments; writes weight and moments


@dataclass(frozen=True)
class StepWork:
    """A step of ``batch`` sequences of ``length`` tokens, over all data-parallel ranks.

    A micro-batch has ``sequences`` sequences; the recipes use 1.  ``zero1`` shards the optimizer's state over data- and
    context-parallel ranks.  In the backward, ``recompute`` repeats the feed-forward networks without experts
    ("selective") or whole layers ("full").

    Logits of ``loss_rows`` rows exist at a time.  An MLP computes ``mlp_rows`` rows of a rank at a time, and repeats
    them in the backward, besides what ``recompute`` repeats (None: all at once, without repeating them).  With
    ``offload``, what a layer keeps for its backward is not in memory.  ``operations`` determine which activations stay
    in memory: those of Megatron's fused norm and gate ("fused"), or of longctx's layers on a GPU ("cuda") or a CPU
    ("cpu").

    ``documents`` has the lengths of the documents of each of some sequences, whose mean counts: tokens attend within
    their document.  Without it, a sequence is one document.
    """

    length: int
    batch: int
    sequences: int = 1
    zero1: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    loss_rows: int | None = None
    mlp_rows: int | None = None
    offload: bool = False
    operations: Literal["fused", "cuda", "cpu"] = "fused"
    documents: tuple[tuple[int, ...], ...] = ()


def step_cost(
    shape: Decoder, mesh: Degrees, machine: Machine, work: StepWork, strategy: str, numbers: Numbers
) -> PassCost:
    """Return the seconds by part, and the bytes sent by axis, of a training step of ``work`` on one rank.

    The parts are "products", "attention", "ring", "ulysses", "tp", "experts", "overhead", "gradients" and "optimizer",
    and with ``mesh.pp`` above 1 also "pipeline".  The axes are "ring", "ulysses", "tp", "ep", "dp" and "pp"; "dp" is
    the sum of gradients over data- and context-parallel ranks, with ZeRO-1 also the gathering of weights.
    """
    # 1. One micro-batch through this stage's layers.
    machine = machine.shared_by(mesh)
    attention, sent = _attention(shape, mesh, machine, work, strategy, numbers)
    products, tp_s, tp_bytes = _products(shape, mesh, machine, work, numbers)
    overhead = shape.layers / mesh.pp * (3 * machine.layer_s + 2 * mesh.ring * machine.step_s)
    # With sequence parallelism, each tensor-parallel rank sends its share of the rows to the next stage.
    hop_rows = work.length * work.sequences / (mesh.ulysses * mesh.ring * mesh.tp)
    hop_bytes = hop_rows * shape.hidden * numbers.element
    stage = machine.level(mesh.pp, mesh.tp * mesh.ulysses * mesh.ring * mesh.dp).hop
    rows, again = work.length * work.sequences / (mesh.tp * mesh.ulysses * mesh.ring), work.recompute == "full"
    experts_s, of_experts = experts_cost(shape, mesh, machine, rows, numbers.element, recomputed=again)
    parts = {**attention, "products": products, "tp": tp_s, "experts": experts_s, "overhead": overhead}
    # 2. All micro-batches, and the pipeline's bubble: a stage waits while the pipeline fills and drains.
    micro = work.batch / (mesh.dp * work.sequences)
    once = sum(parts.values())
    parts = {name: micro * seconds for name, seconds in parts.items()}
    if mesh.pp > 1:
        parts["pipeline"] = (mesh.pp - 1) * once + 2 * (micro + mesh.pp - 1) * stage.seconds(hop_bytes)
    # 3. Gradients and the optimizer.
    reduce_s, update_s, reduced = _update(shape, mesh, machine, work, numbers)
    parts |= {"gradients": reduce_s, "optimizer": update_s}
    sent = {axis: micro * size for axis, size in {**sent, "tp": tp_bytes, "ep": of_experts}.items()}
    return PassCost(parts, {**sent, "dp": reduced, "pp": 2 * micro * hop_bytes * (mesh.pp > 1)})


def stage_weights(shape: Decoder, mesh: Degrees) -> float:
    """Return the number of weights on one rank: its share of a stage's layers, and of embedding, head or both."""
    return sum(weights_by_replicas(shape, mesh).values())


def weights_by_replicas(shape: Decoder, mesh: Degrees) -> dict[int, float]:
    """Return the number of weights on one rank, by the number of ranks that hold a copy of them.

    Ranks that divide the experts hold copies of all other weights.
    """
    ends = (1 if shape.tied or mesh.pp > 1 else 2) * shape.vocab_size * shape.hidden
    projections, _ = layer_weights(shape)
    stage, replicas = shape.layers / mesh.pp, mesh.dp * mesh.ulysses * mesh.ring
    dense = ((projections + dense_ffn_weights(shape)) * stage + ends) / mesh.tp
    experts = expert_weights(shape) * stage / mesh.ep / mesh.tp
    return {replicas: dense + experts} if mesh.ep == 1 else {replicas: dense, replicas // mesh.ep: experts}


def _attention(
    shape: Decoder, mesh: Degrees, machine: Machine, work: StepWork, strategy: str, numbers: Numbers
) -> tuple[dict[str, float], dict[str, float]]:
    """Return a micro-batch's seconds of attention by part and bytes sent by axis, forward and backward together."""
    hardware = machine.kernel(mesh.ring, mesh.tp * mesh.ulysses)
    link = machine.level(mesh.ulysses, mesh.tp).exchange
    seconds = {"attention": 0.0, "ring": 0.0, "ulysses": 0.0}
    sent = {"ring": 0.0, "ulysses": 0.0}
    for one, all_layers in _ring_works(shape, mesh, machine, work, numbers):
        layers = all_layers / mesh.pp
        start, again = start_seconds(one, hardware), machine.backward
        blocks = mesh.ring * ((1 + again) * block_seconds(one, hardware) + (1 - again) * start)
        passes = COSTS[strategy](one, hardware), backward_cost(one, hardware)
        seconds["attention"] += layers * blocks
        seconds["ring"] += layers * (sum(cost.seconds for cost in passes) - blocks)
        # Forward and backward; recomputation exchanges heads again, but does not run the ring again.
        exchanges = 2 if work.recompute == "none" else 3
        seconds["ulysses"] += layers * exchanges * ulysses_seconds(one, mesh.ulysses, link)
        sent["ring"] += layers * sum(cost.bytes_sent for cost in passes)
        sent["ulysses"] += layers * exchanges * sum(ulysses_bytes(one, mesh.ulysses))
    return seconds, sent


def _ring_works(
    shape: Decoder, mesh: Degrees, machine: Machine, work: StepWork, numbers: Numbers
) -> Iterator[tuple[Work, float]]:
    """Yield `ring_works` of a micro-batch; of several sequences with documents, each with its share of the layers."""
    sequences = [documents for documents in work.documents if documents] or [(work.length,)]
    for documents in sequences:
        new = documents * work.sequences
        for one, layers in ring_works(shape, mesh, new, [0] * len(new), numbers, machine.partial_element_bytes):
            yield one, layers / len(sequences)


def _products(
    shape: Decoder, mesh: Degrees, machine: Machine, work: StepWork, numbers: Numbers
) -> tuple[float, float, float]:
    """Return the seconds of a micro-batch's GEMMs, and the seconds and bytes of its tensor-parallel all-reduces."""
    # 1. GEMMs.  An MLP in tiles is repeated once more.
    projections, ffn = layer_weights(shape)
    rows, layers = work.length * work.sequences / (mesh.ulysses * mesh.ring), shape.layers / mesh.pp
    again = {"none": 0.0, "selective": dense_ffn_weights(shape), "full": projections + ffn}[work.recompute]
    again += dense_ffn_weights(shape) if work.mlp_rows else 0.0
    once, head = layers * (projections + ffn), shape.hidden * shape.vocab_size  # the last stage has the head
    unread = layers * (ffn - dense_ffn_weights(shape) - expert_weights(shape) / mesh.ep)  # other ranks' experts
    backward, read_s = 2.0, numbers.element / machine.memory_bytes_per_s
    gradient_s, of_head = 3 * read_s, 3 * read_s * head
    if rates := machine.training:
        backward, gradient_s, of_head = rates.backward, rates.gradient_s, rates.loss_s * rows * shape.vocab_size
    read = ((once - unread) * gradient_s + layers * again * read_s + of_head) / mesh.tp
    products = 2 * ((1 + backward) * once + 3 * head + layers * again) * rows / mesh.tp / machine.gemm_flops + read
    # 2. All-reduces.  A norm of queries or keys over all heads sums squares, in the backward too.
    size = rows * shape.hidden * numbers.element
    whole, tiled = (layers * count for count in _layer_sums(shape, mesh, work, numbers.spd_share))
    tiles = ceil(rows / mesh.tp / work.mlp_rows) if work.mlp_rows else 1
    norm_sums = layers * layer_reductions(shape, 0)[2] * (3 if work.recompute == "full" else 2)
    tp_s = whole * machine.all_reduce_seconds(size, mesh.tp) + norm_sums * machine.all_reduce_seconds(4 * rows, mesh.tp)
    tp_s += tiled * tiles * machine.all_reduce_seconds(size / tiles, mesh.tp)
    return products, tp_s, 2 * (mesh.tp - 1) / mesh.tp * ((whole + tiled) * size + norm_sums * 4 * rows)


def _layer_sums(shape: Decoder, mesh: Degrees, work: StepWork, share: float) -> tuple[float, float]:
    """Return a layer's average numbers of tensor-parallel all-reduces: of all rows at once, and of ``mlp_rows`` rows.

    The second number counts all tiles of an MLP together as one.  The ``share`` of the blocks drops a reduction.
    """
    # Recomputing a dense MLP gathers its input and scatters its output again: together one reduction.  A block that
    # drops its reduction does neither.  It gathers and scatters its input and output once in each direction; if its
    # outputs are normalised, it scatters, and in the backward gathers, twice as much.
    normed, dense = shape.norms != "pre", 1 - expert_layers(shape) / shape.layers
    again = {"none": 0.0, "selective": dense - share, "full": 2 - share * (0.5 if normed else 1)}
    whole = 5 - (2 if normed else 3) * share + again[work.recompute]
    if mesh.ep > 1:
        whole *= 1 - expert_layers(shape) / shape.layers / 2
    if not work.mlp_rows:
        return whole, 0.0
    # Half of the 5 are those of an MLP.  Recomputation repeats its tiles, and their own backward repeats them again.
    mlps = max(0.0, dense - share)
    in_tiles = mlps * (2.5 + (work.recompute != "none"))
    return whole - in_tiles, in_tiles + mlps


def _update(
    shape: Decoder, mesh: Degrees, machine: Machine, work: StepWork, numbers: Numbers
) -> tuple[float, float, float]:
    """Return the seconds of summing gradients, those of the optimizer, and the bytes that a rank sends for both."""
    # With ZeRO-1, scattering gradients and gathering weights take half an all-reduce each.
    moved = (4 + numbers.element) / 2 if work.zero1 else 4
    update_s = machine.training.update_s if machine.training else _UPDATE_BYTES / machine.memory_bytes_per_s
    seconds = update = sent = 0.0
    for replicas, weights in weights_by_replicas(shape, mesh).items():
        stride = mesh.tp * mesh.dp * mesh.ulysses * mesh.ring // replicas
        seconds += machine.all_reduce_seconds(weights * moved, replicas, stride)
        update += weights / (replicas if work.zero1 else 1) * update_s
        sent += 2 * (replicas - 1) / replicas * weights * moved
    return seconds, update, sent
