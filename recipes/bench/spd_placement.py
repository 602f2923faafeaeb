"""Losses when one block drops its reduction, by where its terms are added (arXiv 2502.20727, Table 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longctx.shapes import Float, Tensor
from longctx.spd.text import PackedText

if TYPE_CHECKING:
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.layer import SPDTransformerLayer

Hidden = Float[Tensor, "b s hidden"]
BATCH = 4  # sequences per pass
# Y is a rank's partial attention output, b the attention's bias; each is added before or after the MLP's reduction.
PLACEMENTS = ("as it should", "Y after the reduction", "b after, as it should", "b before the reduction")


def placement_losses(blocks: Blocks, text: PackedText, block: int) -> dict[str, float]:
    """Return the mean loss (nats per token) with ``block`` alone dropping its reduction, by name of placement.

    A placement (`PLACEMENTS`) is where the block adds attention's output and bias b: before or after the remaining
    reduction.  Source: arXiv 2502.20727, Table 1.  The model has no bias, so the mean of the attention's output serves
    as b: each rank's partial output is centred by its own mean, which makes the equations with a bias (4.1.2) describe
    the same block.  Afterwards ``block`` does not drop its reduction; the call switches no other block.
    """
    totals = dict.fromkeys(PLACEMENTS, 0.0)
    for begin in range(0, len(text), BATCH):
        batch = text[slice(begin, begin + BATCH)]
        x = blocks.embed(batch.tokens)
        for layer in blocks.model.decoder.layers[:block]:
            x = blocks.run(layer, x)
        outputs = placed_outputs(blocks, blocks.model.decoder.layers[block], x)
        for placement, output in zip(PLACEMENTS, outputs, strict=True):
            last = output
            for layer in blocks.model.decoder.layers[block + 1 :]:
                last = blocks.run(layer, last)
            totals[placement] += blocks.loss(last, batch)
    return {placement: total / int(text.mask.sum()) for placement, total in totals.items()}


def placed_outputs(blocks: Blocks, layer: SPDTransformerLayer, x: Hidden) -> list[Hidden]:
    """Return the outputs of the block ``layer`` for its input ``x``: one for each of `PLACEMENTS`, in their order.

    The block drops its reduction during the call, and does not drop it afterwards.  Only the second output differs
    between ranks.
    """
    # 1. This rank's attention output, the reduced one, and a bias taken from its mean.
    layer.drop(dropped=True)
    partials = blocks.partials(layer, x)
    mine, whole = partials[blocks.tp.rank], torch.stack(partials).sum(0)
    bias = whole.mean((0, 1))
    centred = mine - mine.mean((0, 1))

    # 2. The MLP's reduced output, without and with the bias in its input.
    def mlp(attention: Hidden) -> Hidden:
        part = blocks.mlp_of(layer, x, attention)
        first, *others = blocks.tp.all_gather(part, [tuple(part.shape)] * blocks.tp.size)
        return sum(others, start=first)

    z, z_biased = mlp(mine), mlp(centred + bias)
    layer.drop(dropped=False)
    # 3. The four sums.  A bias added before the reduction is summed over all ranks.
    with_bias = x + (whole - bias) + z_biased
    return [x + whole + z, x + z + mine, with_bias + bias, with_bias + blocks.tp.size * bias]
