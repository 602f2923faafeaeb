"""A block learns to do without its first reduction: heads and neurons grouped, then distilled (2502.20727, 4.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from longctx.megatron.blocks import Blocks, Hidden
from longctx.shapes import Tensor
from longctx.spd.distill import Distillation, distil, error_of
from longctx.spd.grouping import matched, placed, regrouped, scattered
from longctx.spd.settings import BlockClass, Repair


@dataclass(frozen=True)
class Repaired:
    """A ``layer`` that drops its reduction; its relative squared errors on text that it has not learned from."""

    layer: Any
    zero_shot: float
    grouped: float
    distilled: float


def repair(
    blocks: Blocks,
    block: int,
    kind: BlockClass,
    inputs: Hidden,
    outputs: Hidden,
    how: Repair,
    step_done: Callable[[float], None] = lambda _: None,
) -> Repaired:
    """Block ``block``, repaired as is due to its ``kind``, so that from ``inputs`` it gives about ``outputs``.

    Every tensor-parallel rank calls this, with the same states.
    """
    layer = blocks.copy_of(block, own_norms=how.own_norms)
    learned, held_out = slice(how.sequences), slice(how.sequences, None)

    def student(x: Tensor) -> Tensor:
        return blocks.run(layer, x)

    def error() -> float:
        return error_of(student, inputs[held_out], outputs[held_out], how.batch)

    zero_shot = grouped = error()
    if kind in how.group and how.grouping != "none":
        group(blocks, layer, inputs[: how.looked_at], how.grouping)
        grouped = error()
    distilled = grouped
    if kind in how.distil:
        course = Distillation(how.epochs, how.batch, how.lr, seed=block)
        for loss in distil(student, list(layer.parameters()), inputs[learned], outputs[learned], course):
            step_done(loss)
        distilled = error()
    return Repaired(layer, zero_shot, grouped, distilled)


@torch.no_grad()
def group(blocks: Blocks, layer: Any, x: Hidden, grouping: str) -> None:
    """Put ``layer``'s heads and neurons on the ranks where they miss least when they see those heads alone.

    First KV groups are spread, the alike on different ranks (Eq. 2); then the MLP's shards go to the heads that move
    them most (Eq. 3), or each neuron by itself to where its error is least.
    """
    shape, ranks = blocks.shape, blocks.tp.size
    groups, neurons = range(shape.kv_heads), range(shape.ffn)
    if shape.kv_heads > ranks:  # else there is one to a rank, and nothing to spread
        sets = scattered(blocks.group_features(layer, x), ranks)
        _regroup(blocks, layer, [one for rank in sets for one in rank], neurons)
    if grouping == "neurons":
        order = list(placed(blocks.neuron_errors(layer, x)))
    else:
        each = shape.ffn // ranks
        shard_of = matched(blocks.shard_norms(layer, x))
        order = [shard * each + neuron for shard in shard_of for neuron in range(each)]
    _regroup(blocks, layer, groups, order)


def _regroup(blocks: Blocks, layer: Any, groups: Any, neurons: Any) -> None:
    blocks.fill(layer, regrouped(blocks.tensors_of(layer), blocks.shape, groups, neurons))
