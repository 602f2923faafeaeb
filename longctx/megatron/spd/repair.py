"""A block learns to do without its first reduction: grouped and distilled (2502.20727, 4.2), between that fitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longctx.config import BlockClass, Repair
from longctx.megatron.spd.blocks import Blocks, Hidden
from longctx.shapes import Tensor
from longctx.spd.distill import Distillation, distill, error_of
from longctx.spd.grouping import assign_heads, assign_neurons, assign_shards, reorder_block


@dataclass(frozen=True)
class Repaired:
    """A ``layer`` that drops its reduction; its relative squared errors on text that it has not learned from.

    If it is fitted, neurons are placed for what that will leave, and ``grouped`` is the error before.
    """

    layer: Any
    zero_shot: float
    grouped: float
    fitted: float
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

    zero_shot = error()
    calibration_sequences, grouped = inputs[: how.calibration_sequences], zero_shot
    groups = kind in how.group and how.grouping != "none"
    if groups:
        spread_heads(blocks, layer, calibration_sequences)
    guesses = blocks.guesses(layer, calibration_sequences) if kind in how.fit else None
    if groups:
        place_neurons(blocks, layer, calibration_sequences, how.grouping, guesses)
        grouped = error()
    fitted = grouped
    if guesses:
        fit(layer, guesses[blocks.tp.rank])
        fitted = error()
    distilled = fitted
    if kind in how.distil:
        course = Distillation(how.epochs, how.batch, how.lr, seed=block)
        for loss in distill(student, list(layer.parameters()), inputs[learned], outputs[learned], course):
            step_done(loss)
        distilled = error()
    return Repaired(layer, zero_shot, grouped, fitted, distilled)


@torch.no_grad()
def spread_heads(blocks: Blocks, layer: Any, x: Hidden) -> None:
    """Put KV groups of ``layer`` that are alike on different ranks (2502.20727, Eq. 2), if a rank has more than one."""
    shape = blocks.shape
    if shape.kv_heads > blocks.tp.size:
        sets = assign_heads(blocks.group_features(layer, x), blocks.tp.size)
        _regroup(blocks, layer, [one for rank in sets for one in rank], range(shape.ffn))


@torch.no_grad()
def place_neurons(
    blocks: Blocks, layer: Any, x: Hidden, grouping: str, guesses: Sequence[Tensor] | None = None
) -> None:
    """Put ``layer``'s shards of the MLP to the heads that move them most (2502.20727, Eq. 3).

    Or each neuron by itself where its error is least, when it sees that rank's heads alone, or what the rank guesses.
    """
    if grouping == "neurons":
        order = list(assign_neurons(blocks.neuron_errors(layer, x, guesses)))
    else:
        each = blocks.shape.ffn // blocks.tp.size
        shard_of = assign_shards(blocks.shard_norms(layer, x))
        order = [shard * each + neuron for shard in shard_of for neuron in range(each)]
    _regroup(blocks, layer, range(blocks.shape.kv_heads), order)


@torch.no_grad()
def fit(layer: Any, guess: Tensor) -> None:
    """Let ``layer``'s neurons on this rank see the ``guess`` that `Blocks.guesses` has for it."""
    layer.mlp.linear_fc1.weight.copy_(layer.mlp.linear_fc1.weight @ guess)


def _regroup(blocks: Blocks, layer: Any, groups: Any, neurons: Any) -> None:
    blocks.fill(layer, reorder_block(blocks.tensors_of(layer), blocks.shape, groups, neurons))
