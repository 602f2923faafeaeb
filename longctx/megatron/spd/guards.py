"""Measure the figures of `longctx.spd.guards` on tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longctx.megatron.model import rows_of_logits
from longctx.megatron.spd.blocks import Blocks
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.megatron.spd.likelihood import log_likelihoods
from longctx.shapes import Float, Int, Tensor, Tokens
from longctx.spd.guards import GuardFigures
from longctx.spd.text import PackedText

_COPIES, _COPY_TOKENS = 8, 64  # repeated sequences, and the most tokens before the repetition


def measure_guards(blocks: Blocks, layers: Sequence[SPDTransformerLayer], text: PackedText) -> GuardFigures:
    """Return, on every rank, the figures of the model with the blocks ``layers`` on the sequences of ``text``.

    Every tensor-parallel rank calls this.  ``layers`` has all blocks in order.  Copying is measured on random sequences
    of ``text``'s tokens (`repeated_tokens`), the same in each call.
    """
    log_probs, _, norms = _predict(blocks, layers, text.tokens, text.targets)
    repeated = repeated_tokens(text.tokens)
    _, likeliest, _ = _predict(blocks, layers, repeated[:, :-1], repeated[:, 1:])
    return GuardFigures(-log_probs, text.mask, norms, share_copied(likeliest, repeated))


def share_copied(likeliest: Int[Tensor, "b s"], repeated: Int[Tensor, "b twice"]) -> float:
    """Return the share of the repeated tokens in ``repeated`` that the model predicts.

    ``likeliest`` has the most likely next token after each token of ``repeated`` except the last.  The first token of
    the repetition does not count, because no earlier token tells that a repetition begins.
    """
    half = repeated.shape[1] // 2
    return float((likeliest[:, half:] == repeated[:, half + 1 :]).double().mean())


def repeated_tokens(tokens: Tokens) -> Tokens:
    """Return 8 random sequences of tokens that occur in ``tokens``, each followed by its repetition.

    Before its repetition, a sequence has at most 64 tokens, and at most half the length of ``tokens``.
    """
    generator = torch.Generator().manual_seed(0)
    known = tokens.unique()
    length = min(_COPY_TOKENS, tokens.shape[1] // 2)
    chosen = known[torch.randint(len(known), (_COPIES, length), generator=generator)]
    return torch.cat([chosen, chosen], 1)


@torch.no_grad()
def _predict(
    blocks: Blocks, layers: Sequence[SPDTransformerLayer], tokens: Tokens, targets: Tokens
) -> tuple[Float[Tensor, "b s"], Int[Tensor, "b s"], Float[Tensor, " b"]]:
    """Return each target's log-probability, each likeliest token, and each first token's largest norm after a block."""
    log_probs, likeliest, norms = [], [], []
    size = rows_of_logits(blocks.shape.vocab_size)
    for sequence, wanted in zip(tokens, targets, strict=True):
        x, largest = blocks.embed(sequence[None]), 0.0
        for layer in layers:
            x = blocks.run(layer, x)
            largest = max(largest, float(x[0, 0].norm()))
        final = blocks.model.decoder.final_layernorm(x[0].unsqueeze(1))
        parts = [
            log_likelihoods(blocks.model, rows, target.unsqueeze(1), blocks.tp, blocks.shape.vocab_size)
            for rows, target in zip(final.split(size), wanted.split(size), strict=True)
        ]
        log_probs.append(torch.cat([values for values, _ in parts]).squeeze(1))
        likeliest.append(torch.cat([best for _, best in parts]).squeeze(1))
        norms.append(largest)
    return torch.stack(log_probs), torch.stack(likeliest), torch.tensor(norms)
