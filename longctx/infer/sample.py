"""From logits to a token: greedy, or drawn by temperature and top-p."""

import torch

from longctx.config import Sampling
from longctx.shapes import Float, Tensor


def choose_token(logits: Float[Tensor, " v"], sampling: Sampling, position: int) -> int:
    """The token at ``position``: the likeliest at temperature 0, else drawn from the nucleus of ``top_p``.

    The draw is seeded by ``sampling.seed`` and ``position`` alone: whichever rank owns the row, and however
    many there are, the same logits give the same token.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    ranked, order = torch.softmax(logits.double().cpu() / sampling.temperature, -1).sort(descending=True)
    before = ranked.cumsum(0) - ranked
    ranked = ranked.masked_fill(before >= sampling.top_p, 0.0)  # the likeliest is always kept
    draw = torch.Generator().manual_seed(sampling.seed * 1_000_003 + position)
    return int(order[torch.multinomial(ranked, 1, generator=draw)])
