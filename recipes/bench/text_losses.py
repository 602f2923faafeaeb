"""Losses of the sequences of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longctx.shapes import Float, Tensor
from longctx.spd.text import PackedText
from recipes.bench.spd_placement import BATCH

if TYPE_CHECKING:
    from longctx.megatron.spd.blocks import Blocks


def sequence_losses(blocks: Blocks, text: PackedText) -> Float[Tensor, " sequences"]:
    """Return the summed loss of each sequence of ``text`` in nats, with the blocks' current plan and reductions."""
    sums = []
    for begin in range(0, len(text), BATCH):
        batch = text[slice(begin, begin + BATCH)]
        x = blocks.embed(batch.tokens)
        for layer in blocks.model.decoder.layers:
            x = blocks.run(layer, x)
        sums += [blocks.loss(x[slice(i, i + 1)], batch[slice(i, i + 1)]) for i in range(len(batch))]
    return torch.tensor(sums, dtype=torch.float64)


def mean_loss(sums: Float[Tensor, " sequences"], text: PackedText) -> float:
    """Return the mean loss of ``text`` in nats per token; ``sums`` are its `sequence_losses`."""
    return float(sums.sum()) / int(text.mask.sum())
