"""Choose the next token of each sequence after a pass.

The rank that has a sequence's last row samples the token, and all ranks receive it.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import torch

from longctx.attention.layout import Layout
from longctx.infer.engine import Engine, next_logits
from longctx.infer.prefill import Chunk
from longctx.infer.refuse import NOT_FINITE, refuse_not_finite
from longctx.infer.sample import TokenLogprob, choose_token, token_logprob
from longctx.infer.turn import Conversation
from longctx.megatron.sharded import WeightShare
from longctx.shapes import Float, Tensor


def choose_next(
    engine: Engine,
    sequences: Mapping[int, Conversation],
    chunk: Chunk,
    hidden: Float[Tensor, "s b hidden"],
    layout: Layout,
    share: WeightShare | None = None,
) -> dict[int, int]:
    """Choose the next token of each sequence whose last token was in this pass; return these tokens by sequence.

    All ranks must call this, and get the same tokens.  The caller appends them.  ``hidden`` has the final hidden states
    of this rank's rows; ``layout`` says which tokens of ``chunk`` these rows are.  With a ``share``, ``hidden`` has the
    rows of all tokens on every rank, the ranks compute the logits together, and ``layout`` says which rank samples.
    Sequences with ``sampling.logprobs`` also get the token's log-probabilities, in `Conversation.logprobs`.

    Raises ValueError, on every rank, for logits that are not finite.
    """
    # 1. The packed row of each such sequence's last token, and the ranks that hold these rows.
    last_rows: dict[int, int] = {}  # row -> sequence
    for i, end in zip(chunk, accumulate(map(len, chunk.values())), strict=True):
        if sequences[i].cached == len(sequences[i].tokens):
            last_rows[end - 1] = i
    rows = [layout.index(rank).tolist() for rank in range(engine.ranks)]
    last_rows_by_rank = [[row for row in rank_rows if row in last_rows] for rank_rows in rows]

    # 2. Each rank samples from the logits of its rows.
    asked = [sequences[i].sampling.logprobs for i in last_rows.values()]
    top = max((number for number in asked if number is not None), default=None)
    sampled, own_rows = [], last_rows_by_rank[engine.rank]
    at = [rows[engine.rank].index(row) for row in own_rows]
    logits_of_rows = next_logits(engine, hidden, share)[at] if share else next_logits(engine, hidden[at])
    for row, row_logits in zip(own_rows, logits_of_rows[:, 0], strict=True):
        sampled.append(_sample(sequences[last_rows[row]], row_logits, top))

    # 3. All ranks get all tokens, and their log-probabilities.
    width = 1 if top is None else 2 + 2 * top
    local = torch.tensor(sampled, dtype=torch.double, device=hidden.device).reshape(len(sampled), width)
    shapes = [(len(rank_rows), width) for rank_rows in last_rows_by_rank]
    choices = torch.cat(engine.context.all_gather(local, shapes)).tolist()
    refuse_not_finite(engine, [int(token) for token, *_ in choices], [sequences[i].cache for i in chunk])
    choice_of = dict(zip(chain.from_iterable(last_rows_by_rank), choices, strict=True))
    for row, i in last_rows.items():
        _record_logprobs(sequences[i], choice_of[row])
    return {i: int(choice_of[row][0]) for row, i in last_rows.items()}


def _sample(sequence: Conversation, logits: Float[Tensor, " v"], top: int | None) -> list[float]:
    """Choose the next token of ``sequence``; return a list that begins with this token, or with `NOT_FINITE`.

    `NOT_FINITE` stands for logits that are NaN or infinite.  With ``top``, the token's log-probability follows, then
    (token, log-probability) of the ``top`` most likely tokens.
    """
    width = 1 if top is None else 2 + 2 * top
    if not logits.isfinite().all():
        return [NOT_FINITE] + [0.0] * (width - 1)
    tokens, begin = sequence.tokens, sequence.answer_begin
    token = choose_token(logits, sequence.sampling, sequence.cached - 1, tokens[:begin], tokens[begin:])
    if top is None:
        return [token]
    choice = token_logprob(logits, token, top)
    numbers = [token, choice.logprob, *chain.from_iterable(choice.top)]
    return numbers + [0.0] * (width - len(numbers))


def _record_logprobs(sequence: Conversation, numbers: Sequence[float]) -> None:
    """Append a token's log-probabilities to ``sequence``, if its sampling settings ask for them.

    ``numbers`` are a result of `_sample`.
    """
    count = sequence.sampling.logprobs
    if count is not None:
        top = [(int(token), logprob) for token, logprob in zip(numbers[2::2], numbers[3::2], strict=True)]
        sequence.logprobs.append(TokenLogprob(int(numbers[0]), numbers[1], tuple(top[:count])))
