"""Training step on a mesh: shards packed sequences by document; loss and gradient equal those of a single rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from longctx.attention.kernel import Kernel
from longctx.attention.layout import LAYOUTS, Layout, shard_balanced
from longctx.attention.mask import causal_within
from longctx.attention.partial import Partial
from longctx.config import Mesh
from longctx.data.batches import Batch
from longctx.megatron.attention import Pass, rotary_tables
from longctx.megatron.runtime import Runtime
from longctx.megatron.training.offload import Offload, OffloadedPartials
from longctx.megatron.training.optimizer import (
    LossSums,
    MicroBatch,
    MicroBatches,
    clear_gradients,
    forward_backward,
    mean_router_loss,
    optimizer_step,
)
from longctx.megatron.training.state import TrainState
from longctx.model_shape import ModelShape
from longctx.parallel.comm import doing
from longctx.parallel.experts import bytes_of_experts
from longctx.parallel.hybrid import hybrid
from longctx.parallel.measure.comm_timer import ExposedCommTimer, TimedComm
from longctx.parallel.recording import attention_schedules
from longctx.parallel.ring import Strategy
from longctx.parallel.schedule import refuse_faulty
from longctx.shapes import Positions, Tensor


@dataclass(frozen=True)
class ContextParallel:
    """Context parallelism in training: how ranks share sequences of ``length`` tokens and compute attention over them.

    ``layout`` is a key of `LAYOUTS`.  With ``keep_partials``, each layer's attention result is kept, so that activation
    recomputation in the backward does not run the ring again.  ``dtype`` is the model's.  ``check_schedule`` proves for
    each sequence that attention's messages match on all ranks and cannot deadlock.  ``offload`` takes the activations
    that the backward needs (None: they stay).  Every rank pads its rows to a multiple of ``row_multiple``, also after
    tensor-parallel ranks have split them.
    """

    length: int
    layout: str
    kernel: Kernel
    strategy: Strategy
    keep_partials: bool = False
    dtype: torch.dtype = torch.float32
    check_schedule: bool = False
    offload: Offload | None = None
    row_multiple: int = 1


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats a token), gradient norm before clipping, number of targets that counted, and learning rate.

    ``router_loss`` is the mean of the sequences' router losses, before its coefficient is applied; None if the model
    has no such loss.  ``loss`` does not include it.  ``experts_bytes`` are the bytes that this rank sent in the step
    for expert parallelism.
    """

    loss: float
    grad_norm: float
    tokens: int
    rate: float
    router_loss: float | None
    experts_bytes: int


def time_communication(runtime: Runtime) -> tuple[Runtime, ExposedCommTimer]:
    """Return ``runtime`` with timed groups for attention, experts and losses, and their timer of exposed communication.

    megatron-core's own collectives do not pass through them.
    """
    timer = ExposedCommTimer()
    comms = (runtime.tp, runtime.ulysses, runtime.ring, runtime.tp_context, runtime.ep)
    tp, ulysses, ring, tp_context, ep = (TimedComm(comm, timer) for comm in comms)
    return replace(runtime, tp=tp, ulysses=ulysses, ring=ring, tp_context=tp_context, ep=ep), timer


def train_step(trained: TrainState, batch: Batch, runtime: Runtime, parallelism: ContextParallel) -> StepResult:
    """Run forward, backward and an optimizer step on ``batch``, this data-parallel rank's sequences.

    Every rank calls this.  Asserts that all ranks together have counted the targets of the whole batch.
    """
    clear_gradients(trained)
    sent_before = bytes_of_experts(runtime.ep, runtime.tp)
    sums = forward_backward(trained, micro_batches(batch, runtime, trained.shape, parallelism))
    assert sum(sums.tokens) == batch.counted, f"ranks count {sum(sums.tokens)} tokens, the batch has {batch.counted}"
    norm, rate = optimizer_step(trained)
    experts_bytes = bytes_of_experts(runtime.ep, runtime.tp) - sent_before
    return StepResult(sums.mean, norm, sum(sums.tokens), rate, mean_router_loss(trained), experts_bytes)


@torch.no_grad()
def evaluate(
    trained: TrainState, batches: Sequence[Batch], runtime: Runtime, parallelism: ContextParallel, buckets: int = 1
) -> LossSums:
    """Return sums of losses over ``batches``, one for each of ``buckets`` ranges of positions, without training.

    Bucket i has the rows at positions i * w <= p < (i + 1) * w in their document; w = ``parallelism.length`` /
    ``buckets``.  The sums are over all ranks, and every rank calls this with equally many sequences, at least one.
    The model is in training mode afterwards.
    """
    trained.model.eval()
    parallelism = replace(parallelism, keep_partials=False)
    micro = [micro_batches(batch, runtime, trained.shape, parallelism, buckets) for batch in batches]
    every = MicroBatches([make for one in micro for make in one.makers])
    sums = forward_backward(trained, every, learn=False, buckets=buckets)
    trained.model.train()
    return sums


def micro_batches(
    batch: Batch, runtime: Runtime, shape: ModelShape, parallelism: ContextParallel, buckets: int = 1
) -> MicroBatches:
    """Return a micro-batch for each sequence of ``batch``, with this context rank's rows; each is made when needed.

    Rows are padded to `rows_per_rank`.  Each row gets the number of its bucket: the one of ``buckets`` equal ranges of
    positions in which its position in its document lies (see `evaluate`).

    Raises ValueError for a token beyond the model's vocabulary.  With ``parallelism.check_schedule``, raises
    ScheduleError unless attention's messages match for all sequences.
    """
    shape.refuse_unknown_token(batch.largest_token)
    layouts = [
        shard_balanced(lengths, LAYOUTS[parallelism.layout], [0] * runtime.ring.size).split(runtime.ulysses.size)
        for lengths in batch.lengths
    ]
    if parallelism.check_schedule:
        for layout in layouts:
            _prove_attention(layout, runtime.mesh, shape, parallelism)
    sequences = zip(batch.tokens, batch.targets, batch.mask, layouts, strict=True)
    mean_counted = batch.counted / (len(batch.lengths) * runtime.mesh.dp)
    return MicroBatches(
        [partial(_micro_batch, *one, mean_counted, runtime, shape, parallelism, buckets) for one in sequences]
    )


def rows_per_rank(length: int, runtime: Runtime, multiple: int = 1) -> int:
    """Return the rows that every rank is padded to: enough for a sequence of ``length`` with any document boundaries.

    The number is fixed, because pipeline stages need to know the shape that they receive.  `shard_balanced` gives a
    rank at most two rows more than an even share.  Tensor-parallel ranks split the rows under sequence parallelism, so
    the number is a multiple of ``tp`` x ``multiple``.
    """
    max_rows, step = -(-length // runtime.mesh.context) + 2, runtime.mesh.tp * multiple
    return -(-max_rows // step) * step


def _micro_batch(
    tokens: Tensor,
    targets: Tensor,
    mask: Tensor,
    layout: Layout,
    mean_counted: float,
    runtime: Runtime,
    shape: ModelShape,
    parallelism: ContextParallel,
    buckets: int,
) -> MicroBatch:
    # 1) Which positions of the sequence this rank holds, and the padding up to the common number of rows.
    ring, ulysses = runtime.ring, runtime.ulysses
    rank = ring.rank * ulysses.size + ulysses.rank
    rows = rows_per_rank(parallelism.length, runtime, parallelism.row_multiple)
    index = layout.index(rank)
    missing = rows - len(index)
    assert missing >= 0, f"{len(index)} rows on a rank, room for {rows}"

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).to(runtime.device)

    # 2) The rank's rows; padding has mask 0, so it does not count in the loss.
    positions = layout.positions(rank)
    return MicroBatch(
        tokens=pad(tokens[index]).unsqueeze(0),
        targets=pad(targets[index]).unsqueeze(0),
        mask=pad(mask[index].float()),
        bucket=pad(positions * buckets // parallelism.length),
        attention_pass=_attention_pass(layout, pad(positions), len(index), runtime, shape, parallelism),
        rows=len(index),
        mean_counted=mean_counted,
        offload=parallelism.offload,
    )


def _attention_pass(
    layout: Layout, positions: Positions, rows: int, runtime: Runtime, shape: ModelShape, parallelism: ContextParallel
) -> Pass:
    """Return attention over this rank's first ``rows`` rows; the rows after them are padding, and their output is 0.

    ``positions`` has the positions of all rows.
    """
    offload = parallelism.offload
    partials = {layer: OffloadedPartials(offload) if offload else list[Partial]() for layer in range(shape.layers)}
    by_window = {w: hybrid(runtime.ulysses, runtime.ring, layout, causal_within(w)) for w in set(shape.windows)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        keep = partials[layer] if parallelism.keep_partials else None
        attention = by_window[shape.windows[layer]].attention(parallelism.kernel, parallelism.strategy, sinks, keep)
        with doing(f"layer {layer}"):
            out = attention(q[:, :rows], k[:, :rows], v[:, :rows])
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - rows))

    angles = torch.promote_types(parallelism.dtype, torch.float32)
    return Pass(attend=attend, rotary=rotary_tables(shape, positions, angles))


def _prove_attention(layout: Layout, mesh: Mesh, shape: ModelShape, parallelism: ContextParallel) -> None:
    """Raise ScheduleError unless attention's messages match on all context ranks, in forward and backward."""
    for window in set(shape.windows):
        schedules = attention_schedules(
            Mesh(ulysses=mesh.ulysses, ring=mesh.ring),
            layout,
            parallelism.strategy,
            heads=shape.heads // mesh.tp,
            kv_heads=shape.kv_heads // mesh.tp,
            head_dim=shape.head_dim,
            mask=causal_within(window),
            dtype=parallelism.dtype,
        )
        refuse_faulty(schedules)
