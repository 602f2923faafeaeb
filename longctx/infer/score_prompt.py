"""Log-probabilities of a prompt's own tokens, computed in the passes that prefill it."""

from collections.abc import Mapping
from itertools import accumulate, chain

import torch

from longctx.attention.layout import Layout
from longctx.infer.engine import Engine, next_logits
from longctx.infer.prefill import Chunk
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
            one = token_logprob(row_logits, targets[row], top)
            local.append([one.logprob, *chain.from_iterable(one.top)])

    # 3.  All ranks get the log-probabilities of all rows.
    width = 1 + 2 * top
    mine = torch.tensor(local, dtype=torch.double, device=hidden.device).reshape(len(local), width)
    numbers = torch.cat(engine.context.all_gather(mine, [(len(one), width) for one in rows])).tolist()
    numbers_of = dict(zip(chain.from_iterable(rows), numbers, strict=True))
    for i, end in zip(chunk, accumulate(map(len, chunk.values())), strict=True):
        _record(
            sequences[i], [(targets[row], numbers_of[row]) for row in range(end - len(chunk[i]), end) if row in targets]
        )


def _record(sequence: Conversation, predictions: list[tuple[int, list[float]]]) -> None:
    if sequence.prompt_logprobs is None:
        return
    count = sequence.sampling.logprobs or 0
    for token, (logprob, *pairs) in predictions:
        top = [(int(other), value) for other, value in zip(pairs[::2], pairs[1::2], strict=True)]
        sequence.prompt_logprobs.append(TokenLogprob(token, logprob, tuple(top[:count])))
