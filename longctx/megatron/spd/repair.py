"""Repair of one block that drops its first reduction (arXiv 2502.20727, 4.2): group, fit, distil.

A block that drops its reduction is worse, because rank r's MLP reads norm(x + P_r) instead of norm(x + sum P).  See
`layer`; biases are left out here.

Before (dropped, zero-shot):   out = x + sum_r (P_r + MLP_r(norm(x + P_r)))
After:                         out = x + sum_r (P'_r + MLP'_r(norm(x + P'_r)))

with the same architecture and communication, and other weights:

    group heads     P'_r: KV groups with similar attention go to different ranks (Eq. 2), so that each rank's heads
                    resemble the whole set.  sum_r P'_r = sum_r P_r.
    group neurons   MLP'_r: each MLP shard (Eq. 3), or each neuron, goes to the rank where its error is least.
    fit             W -> W M_r in MLP'_r's first matrix: it then reads the least-squares prediction
                    M_r norm(x + P'_r) of norm(x + sum P).  Not in the paper.
    distil          gradient steps on all weights of the block, towards the stock block's output (4.2.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longctx.config import BlockClass, Repair
from longctx.megatron.spd.blocks import Blocks, Hidden, LinearMap
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.shapes import Float, Tensor
from longctx.spd.distill import Distillation, distill, error_of, position_weights
from longctx.spd.grouping import assign_heads, assign_neurons, assign_shards, reorder_block


@dataclass(frozen=True)
class RepairResult:
    """A repaired ``layer``, which drops its reduction, and its error after each step of `repair`.

    Errors are relative squared errors on held-out sequences: ``zero_shot`` before any repair, then after grouping,
    after fitting, and after distillation.  A step that is left out repeats the error before it.

    With grouping "neurons", the neurons of a block that is fitted later are placed by the errors that remain after
    fitting.  ``grouped`` is still measured before fitting.
    """

    layer: SPDTransformerLayer
    zero_shot: float
    grouped: float
    fitted: float
    distilled: float


def repair(
    blocks: Blocks,
    block: int,
    block_class: BlockClass,
    inputs: Hidden,
    outputs: Hidden,
    settings: Repair,
    step_done: Callable[[float], None] = lambda _: None,
) -> RepairResult:
    """Repair a copy of block ``block`` so that, with its reduction dropped, it maps ``inputs`` close to ``outputs``.

    ``settings`` lists the steps for the block's ``block_class``.  The first ``settings.sequences`` of ``inputs`` are
    for training; errors are measured on the rest.  ``step_done`` is called with the loss of each distillation step.
    Every tensor-parallel rank calls this, with the same hidden states.
    """
    training, held_out = slice(settings.sequences), slice(settings.sequences, None)
    calibration_inputs = inputs[: settings.calibration_sequences]
    weights = position_weights(inputs.shape[1], settings.weights).to(inputs)
    grouping = settings.grouping if block_class in settings.group else "none"

    def student(x: Tensor) -> Tensor:
        return blocks.run(layer, x)

    def error() -> float:
        return error_of(student, inputs[held_out], outputs[held_out], settings.batch)

    # 1. Copy the block and drop its reduction.
    layer = blocks.copy_of(block, own_norms=settings.own_norms)
    zero_shot = error()
    # 2. Group heads (Eq. 2).
    if grouping != "none":
        spread_heads(blocks, layer, calibration_inputs)
    # 3. Compute the least-squares maps.  They depend on the heads, and the neurons' errors in step 4 depend on them.
    maps = blocks.linear_maps(layer, calibration_inputs, weights) if block_class in settings.fit else None
    # 4. Group neurons (Eq. 3, or neuron by neuron).
    if grouping != "none":
        place_neurons(blocks, layer, calibration_inputs, weights, grouping, maps)
    grouped = error() if grouping != "none" else zero_shot
    # 5. Fit: fold this rank's map into the MLP's weights.
    if maps:
        fold_linear_map(layer, maps[blocks.tp.rank])
    fitted = error() if maps else grouped
    # 6. Distil (4.2.3).
    distilled = fitted
    if block_class in settings.distil:
        distillation = Distillation(settings.epochs, settings.batch, settings.lr, block, settings.weights)
        for loss in distill(student, list(layer.parameters()), inputs[training], outputs[training], distillation):
            step_done(loss)
        distilled = error()
    return RepairResult(layer, zero_shot, grouped, fitted, distilled)


@torch.no_grad()
def spread_heads(blocks: Blocks, layer: SPDTransformerLayer, x: Hidden) -> None:
    """Move KV groups of ``layer`` with similar attention on ``x`` to different ranks (arXiv 2502.20727, Eq. 2).

    It does nothing if each rank has a single KV group.
    """
    shape = blocks.shape
    if shape.kv_heads > blocks.tp.size:
        sets = assign_heads(blocks.group_features(layer, x), blocks.tp.size)
        _reorder(blocks, layer, [group for rank_groups in sets for group in rank_groups], range(shape.ffn))


@torch.no_grad()
def place_neurons(
    blocks: Blocks,
    layer: SPDTransformerLayer,
    x: Hidden,
    weights: Float[Tensor, " s"],
    grouping: str,
    maps: Sequence[LinearMap] | None = None,
) -> None:
    """Assign the MLP neurons of ``layer`` to ranks, by their behaviour on ``x``, whose positions have ``weights``.

    ``grouping`` "shards" gives each rank one shard of neurons, so that the norms of the shards' outputs, summed over
    ranks, are largest (arXiv 2502.20727, Eq. 3).  ``grouping`` "neurons" assigns each neuron separately, so that the
    summed error is least (see `Blocks.neuron_errors`).  With ``maps``, this is the error that remains when neurons read
    the least-squares prediction.
    """
    if grouping == "neurons":
        order = list(assign_neurons(blocks.neuron_errors(layer, x, weights, maps)))
    else:
        neurons = blocks.shape.ffn // blocks.tp.size
        shard_of_rank = assign_shards(blocks.shard_norms(layer, x))
        order = [shard * neurons + neuron for shard in shard_of_rank for neuron in range(neurons)]
    _reorder(blocks, layer, range(blocks.shape.kv_heads), order)


@torch.no_grad()
def fold_linear_map(layer: SPDTransformerLayer, linear_map: LinearMap) -> None:
    """Multiply this rank's ``linear_map`` M into the MLP's first matrix (gate and up), W -> W M, in place.

    The neurons then read M times their normalised input.
    """
    layer.mlp.linear_fc1.weight.copy_(layer.mlp.linear_fc1.weight @ linear_map)


def _reorder(blocks: Blocks, layer: SPDTransformerLayer, groups: Sequence[int], neurons: Sequence[int]) -> None:
    """Reorder the KV groups and neurons of all ranks in ``layer``, in place; ranks take equal shares of each order."""
    blocks.fill(layer, reorder_block(blocks.tensors_of(layer), blocks.shape, groups, neurons))
