"""Log-probabilities of a prompt's own tokens, computed in the passes that prefill it."""

import math
from collections.abc import Mapping
from itertools import accumulate, chain

import torch

from longctx.attention.layout import Layout
from longctx.infer.engine import Engine, next_logits
from longctx.infer.prefill import Chunk
from longctx.infer.refuse import NOT_FINITE, refuse_not_finite
from longctx.infer.sample import TokenLogprob, token_logprob
from longctx.infer.turn import Conversation
from longctx.megatron.model import rows_of_logits
from longctx.shapes import Float, Tensor


def score_prompts(
    engine: Engine,
    sequences: Mapping[int, Conversation],
    chunk: Chunk,
    hidden: Float[Tensor, "s b hidden"],
    layout: Layout,
) -> None:
    """Append to `Conversation.prompt_logprobs` the log-probabilities of the prompt tokens that follow this pass's rows.

    Sequences whose list is None are left out.  ``hidden`` has the final hidden states of this rank's rows; ``layout``
    says which tokens of ``chunk`` these rows are.  A row predicts the next token of its prompt; the last row predicts
    the first token of the answer, which does not count.  Every rank gets the log-probabilities of all rows.

    Raises ValueError, on every rank, for logits that are not finite.
    """
    # 1. The packed row of each prediction, and its token.
    targets: dict[int, int] = {}
    for i, end in zip(chunk, accumulate(map(len, chunk.values())), strict=True):
        sequence = sequences[i]
        if sequence.prompt_logprobs is not None:
            begin = sequence.cached - len(chunk[i])
            following = sequence.tokens[begin + 1 : sequence.cached + 1]
            targets |= {end - len(chunk[i]) + at: token for at, token in enumerate(following)}
    if not targets:
        return
    top = max(sequences[i].sampling.logprobs or 0 for i in chunk)

    # 2.  Each rank computes the log-probabilities of its rows.
    rows = [[row for row in layout.index(rank).tolist() if row in targets] for rank in range(engine.ranks)]
    place = {row: at for at, row in enumerate(layout.index(engine.rank).tolist())}
    local, own = [], rows[engine.rank]
    step = rows_of_logits(engine.shape.vocab_size)
    for first in range(0, len(own), step):
        some = own[first : first + step]
        for row, row_logits in zip(some, next_logits(engine, hidden[[place[one] for one in some]])[:, 0], strict=True):
            local.append(_score(row_logits, targets[row], top))

    # 3.  All ranks get the log-probabilities of all rows.
    width = 1 + 2 * top
    mine = torch.tensor(local, dtype=torch.double, device=hidden.device).reshape(len(local), width)
    numbers = torch.cat(engine.context.all_gather(mine, [(len(one), width) for one in rows])).tolist()
    refuse_not_finite(
        engine, [NOT_FINITE if math.isnan(one) else 0 for one, *_ in numbers], [sequences[i].cache for i in chunk]
    )
    numbers_of = dict(zip(chain.from_iterable(rows), numbers, strict=True))
    for i, end in zip(chunk, accumulate(map(len, chunk.values())), strict=True):
        _record(
            sequences[i], [(targets[row], numbers_of[row]) for row in range(end - len(chunk[i]), end) if row in targets]
        )


def _score(logits: Float[Tensor, " v"], token: int, top: int) -> list[float]:
    """Return the log-probability of ``token``, then (token, log-probability) of the ``top`` most likely tokens.

    All numbers are NaN if a logit is NaN or infinite: the other ranks expect a row of full width.
    """
    if not logits.isfinite().all():
        return [math.nan] * (1 + 2 * top)
    one = token_logprob(logits, token, top)
    return [one.logprob, *chain.from_iterable(one.top)]


def _record(sequence: Conversation, predictions: list[tuple[int, list[float]]]) -> None:
    if sequence.prompt_logprobs is None:
        return
    count = sequence.sampling.logprobs or 0
    for token, (logprob, *pairs) in predictions:
        top = [(int(other), value) for other, value in zip(pairs[::2], pairs[1::2], strict=True)]
        sequence.prompt_logprobs.append(TokenLogprob(token, logprob, tuple(top[:count])))
