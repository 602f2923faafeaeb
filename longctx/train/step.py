"""A step of training on a mesh: packed sequences are sharded by document; loss and gradient are one rank's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from longctx.attention.kernel import Kernel
from longctx.attention.layout import LAYOUTS, Layout, shard_balanced
from longctx.attention.mask import causal_within
from longctx.attention.partial import Partial
from longctx.data.batches import Batch
from longctx.megatron.attention import Pass
from longctx.megatron.model import rotary_angles
from longctx.megatron.runtime import Runtime
from longctx.megatron.training.optimizer import (
    LossSums,
    MicroBatch,
    TrainState,
    clear_gradients,
    forward_backward,
    optimizer_step,
)
from longctx.model_shape import ModelShape
from longctx.parallel.comm import doing
from longctx.parallel.hybrid import hybrid
from longctx.parallel.ring import Strategy
from longctx.shapes import Tensor


@dataclass(frozen=True)
class Sharding:
    """How sequences of ``length`` are shared and attended to; ``keeping``: a recompute does not run the ring again."""

    length: int
    layout: str
    kernel: Kernel
    strategy: Strategy
    keeping: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step gave: mean loss (nats a token), norm of its gradient before clipping, tokens that counted, rate."""

    loss: float
    grad_norm: float
    tokens: int
    rate: float


def train_step(trained: TrainState, batch: Batch, here: Runtime, how: Sharding) -> StepResult:
    """Change the weights by ``batch``, this data-parallel rank's part of it.  Every rank calls this."""
    clear_gradients(trained)
    sums = forward_backward(trained, micro_batches(batch, here, trained.shape, how))
    assert sum(sums.tokens) == batch.counted, f"ranks count {sum(sums.tokens)} tokens, the batch has {batch.counted}"
    norm, rate = optimizer_step(trained)
    return StepResult(sums.mean, norm, sum(sums.tokens), rate)


@torch.no_grad()
def evaluate(trained: TrainState, batches: Sequence[Batch], here: Runtime, how: Sharding, buckets: int = 1) -> LossSums:
    """Sums over ``batches``, by ``buckets`` of the position in the document; nothing is changed."""
    trained.model.eval()
    still = replace(how, keeping=False)
    micro = [one for batch in batches for one in micro_batches(batch, here, trained.shape, still, buckets)]
    sums = forward_backward(trained, micro, learn=False, buckets=buckets)
    trained.model.train()
    return sums


def micro_batches(batch: Batch, here: Runtime, shape: ModelShape, how: Sharding, buckets: int = 1) -> list[MicroBatch]:
    """This rank's rows of each sequence of ``batch``."""
    sequences = zip(batch.tokens, batch.targets, batch.mask, batch.lengths, strict=True)
    return [_micro_batch(*sequence, here, shape, how, buckets) for sequence in sequences]


def rows_per_rank(length: int, here: Runtime) -> int:
    """Rows that every rank is filled up to, so that pipeline stages know what comes: enough for any documents.

    `shard_balanced` keeps ranks within two rows of even; under sequence parallelism tensor-parallel ranks share them.
    """
    most, tp = -(-length // here.mesh.context) + 2, here.mesh.tp
    return -(-most // tp) * tp


def _micro_batch(
    tokens: Tensor,
    targets: Tensor,
    mask: Tensor,
    lengths: tuple[int, ...],
    here: Runtime,
    shape: ModelShape,
    how: Sharding,
    buckets: int,
) -> MicroBatch:
    ring, ulysses = here.ring, here.ulysses
    layout = shard_balanced(lengths, LAYOUTS[how.layout], [0] * ring.size).split(ulysses.size)
    rank = ring.rank * ulysses.size + ulysses.rank
    rows = rows_per_rank(how.length, here)
    index = layout.index(rank)
    missing = rows - len(index)
    assert missing >= 0, f"{len(index)} rows on a rank, room for {rows}"

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).to(here.device)

    positions = layout.positions(rank)
    return MicroBatch(
        tokens=filled(tokens[index]).unsqueeze(0),
        targets=filled(targets[index]).unsqueeze(0),
        mask=filled(mask[index].float()),
        bucket=filled(positions * buckets // how.length),
        angles=rotary_angles(shape, filled(positions)),
        attention_pass=_pass(layout, len(index), here, shape, how),
    )


def _pass(layout: Layout, rows: int, here: Runtime, shape: ModelShape, how: Sharding) -> Pass:
    """Attention over the real rows; of those that fill up nothing is asked, and their answer is 0."""
    kept: dict[int, list[Partial]] = {layer: [] for layer in range(shape.layers)}
    shared = {w: hybrid(here.ulysses, here.ring, layout, causal_within(w)) for w in set(shape.windows)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = kept[layer] if how.keeping else None
        attention = shared[shape.windows[layer]].attention(how.kernel, how.strategy, keep)
        with doing(f"layer {layer}"):
            out = attention(q[:, :rows], k[:, :rows], v[:, :rows])
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - rows))

    return Pass(attend=attend)
