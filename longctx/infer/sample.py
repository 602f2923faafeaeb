"""Sampling: the next token from logits, greedy or with temperature and top-p."""

import torch

from longctx.config import Sampling
from longctx.shapes import Float, Tensor


def choose_token(logits: Float[Tensor, " v"], sampling: Sampling, position: int) -> int:
    """Choose the token at ``position``: the most likely one at temperature 0, else a draw from the top-p nucleus.

    Only ``sampling.seed`` and ``position`` seed the draw, so the same logits give the same token on any mesh.

    Raises ValueError for logits that are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ValueError(f"no token can be chosen at position {position}: the logits are NaN or infinite")
    if sampling.temperature == 0:
        return int(logits.argmax())
    ranked, order = torch.softmax(logits.double().cpu() / sampling.temperature, -1).sort(descending=True)
    before = ranked.cumsum(0) - ranked
    ranked = ranked.masked_fill(before >= sampling.top_p, 0.0)  # the most likely token always stays
    draw = torch.Generator().manual_seed(sampling.seed * 1_000_003 + position)
    return int(order[torch.multinomial(ranked, 1, generator=draw)])
