"""Log-probabilities of many continuations at once, on any mesh; every rank makes the same calls.

Example: a question of 100 tokens with four choices of 5 tokens takes 100 + 4 x 4 rows, not 4 x 104.
The prefix is run once, then the choices attend to its keys and values; the last token of a choice is
not run, because it predicts nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from eval.answers.requests import Score
from longctx.attention.layout import LAYOUTS, Layout, shard_balanced
from longctx.config import Context
from longctx.infer.cache import BatchCache, Cache, PrefixView
from longctx.infer.engine import Engine
from longctx.infer.prefill import run_pass
from longctx.megatron.model import rows_of_logits
from longctx.megatron.spd.likelihood import log_likelihoods
from longctx.parallel.strategy import STRATEGIES
from longctx.shapes import Float, Tensor

TokenIds = tuple[int, ...]
Prediction = tuple[int, int, int]  # document in a pass, row in the document, the token to predict there
LogProb = tuple[float, bool]  # nats, and whether the token was the most likely one


@dataclass(frozen=True)
class PrefixGroup:
    """Requests that begin with the same ``prefix``, and the ``branches`` that continue it.

    Example: inputs (1 2 3 4) and (1 2 3 6) give the prefix (1 2 3) and the branches (4) and (6).
    An input is a request's tokens without the last.  An input equal to the prefix needs no branch.
    """

    prefix: TokenIds
    branches: tuple[TokenIds, ...]
    requests: tuple[Score, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens to run for all requests of the group."""
        return len(self.prefix) + sum(map(len, self.branches))


def group_by_prefix(requests: Sequence[Score]) -> list[PrefixGroup]:
    """Group the requests of a question that have the same first token; the group with the most tokens to run first.

    A request without a question forms its own group.  A repeated request appears once.
    """
    questions: dict[object, list[Score]] = {}
    for i, request in enumerate(dict.fromkeys(requests)):
        group = (request.question, request.tokens[0]) if request.question else i
        questions.setdefault(group, []).append(request)
    return sorted((_make_group(group) for group in questions.values()), key=lambda group: -group.tokens)


def _make_group(requests: Sequence[Score]) -> PrefixGroup:
    inputs = sorted({request.tokens[:-1] for request in requests})
    first, last = inputs[0], inputs[-1]  # sorted: a prefix of these two is a prefix of all
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    branches = tuple(one[common:] for one in inputs if len(one) > common)
    return PrefixGroup(first[:common], branches, tuple(requests))


def make_batches(groups: Sequence[PrefixGroup], max_tokens: int) -> Iterator[list[PrefixGroup]]:
    """Yield consecutive groups of at most ``max_tokens`` tokens together, or one larger group alone."""
    batch: list[PrefixGroup] = []
    for group in groups:
        if batch and sum(one.tokens for one in batch) + group.tokens > max_tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def score_batch(engine: Engine, context: Context, batch: Sequence[PrefixGroup]) -> dict[Score, LogProb]:
    """Return the answer of each request in ``batch``, on every rank.

    Two passes: all prefixes, packed; then all branches, each attending to its prefix' keys and values.
    Logits are computed only for rows whose prediction is scored.
    """
    # 1. For each pass, list the predictions to score, each once, in a fixed order.
    branches = [(g, branch) for g, group in enumerate(batch) for branch in group.branches]
    predictions = {
        request: list(locate_predictions(g, group, branches, request))
        for g, group in enumerate(batch)
        for request in group.requests
    }
    wanted: tuple[dict[Prediction, None], dict[Prediction, None]] = ({}, {})
    for of_request in predictions.values():
        for pass_number, prediction in of_request:
            wanted[pass_number][prediction] = None
    # 2. Run the prefixes, then the branches.
    caches = [engine.cache(len(group.prefix)) for group in batch]
    log_probs = [_run_and_score(engine, context, [group.prefix for group in batch], caches, list(wanted[0]))]
    if branches:
        views = [PrefixView(caches[g]) for g, _ in branches]
        log_probs.append(_run_and_score(engine, context, [one for _, one in branches], views, list(wanted[1])))
    # 3. Add up the tokens of each request.
    answers = {}
    for request, of_request in predictions.items():
        tokens = [log_probs[pass_number][prediction] for pass_number, prediction in of_request]
        answers[request] = sum(value for value, _ in tokens), all(is_likeliest for _, is_likeliest in tokens)
    return answers


def locate_predictions(
    number: int, group: PrefixGroup, branches: Sequence[tuple[int, TokenIds]], request: Score
) -> Iterator[tuple[int, Prediction]]:
    """Yield, for each scored token of ``request``, the pass that predicts it, and its `Prediction` in that pass.

    Pass 0 runs the prefixes, pass 1 the branches.  A `Prediction` is (document in the pass, row, scored token).
    ``group`` is number ``number`` of its batch.  ``branches`` lists the branches of all groups, each with the number of
    its group.
    """
    prefix, rest = len(group.prefix), request.tokens[len(group.prefix) : -1]
    document = branches.index((number, rest)) if rest else -1
    for at in range(request.begin - 1, len(request.tokens) - 1):
        target = request.tokens[at + 1]
        yield (0, (number, at, target)) if at < prefix else (1, (document, at - prefix, target))


def _run_and_score(
    engine: Engine,
    context: Context,
    documents: Sequence[TokenIds],
    caches: Sequence[Cache],
    wanted: Sequence[Prediction],
) -> Mapping[Prediction, LogProb]:
    """Run ``documents`` in one packed pass, each after the content of its cache; return the answers to ``wanted``.

    A `Prediction` is (document, row, token).  Its answer has the token's log-probability, and whether the token is the
    most likely one.
    """
    lengths = [len(document) for document in documents]
    layout = shard_balanced(lengths, LAYOUTS[context.layout], [0] * engine.ring.size).split(engine.ulysses.size)
    packed = torch.tensor([token for document in documents for token in document])
    strategies = engine.everywhere(STRATEGIES[context.strategy])
    hidden = run_pass(engine, packed, layout, BatchCache(caches, engine.ring.rank), strategies)
    begins = list(accumulate(lengths, initial=0))
    rows = [(begins[document] + at, target) for document, at, target in wanted]
    return dict(zip(wanted, _gather_log_probs(engine, hidden, layout, rows), strict=True))


def _gather_log_probs(
    engine: Engine, hidden: Float[Tensor, "s b hidden"], layout: Layout, rows: Sequence[tuple[int, int]]
) -> list[LogProb]:
    """Return the log-probability of each (packed row, next token) in ``rows``, on every rank.

    Each rank computes those of the rows that it holds; one all-gather gives them to all.
    """
    # 1. Find the entries of ``rows`` that each rank holds; for this rank, also their rows of ``hidden``.
    entries_per_rank, mine = [], []
    for rank in range(engine.ranks):
        local_rows = {row: at for at, row in enumerate(layout.index(rank).tolist())}
        entries_per_rank.append([i for i, (row, _) in enumerate(rows) if row in local_rows])
        if rank == engine.rank:
            mine = [(local_rows[rows[i][0]], rows[i][1]) for i in entries_per_rank[-1]]
    # 2. Unembed this rank's rows, some at a time.
    parts = [torch.zeros(2, 0, dtype=torch.double, device=hidden.device)]
    block = rows_of_logits(engine.shape.vocab_size)
    for begin in range(0, len(mine), block):
        at, targets = torch.tensor(mine[begin : begin + block], device=hidden.device).unbind(1)
        target = targets.unsqueeze(1)
        log_probs, likeliest = log_likelihoods(engine.model, hidden[at], target, engine.tp, engine.shape.vocab_size)
        parts.append(torch.stack([log_probs[:, 0], (likeliest == target)[:, 0].double()]))
    # 3. Gather from all ranks, and put into the order of ``rows``.
    gathered = engine.context.all_gather(torch.cat(parts, 1), [(2, len(of_rank)) for of_rank in entries_per_rank])
    order = [i for of_rank in entries_per_rank for i in of_rank]
    by_row = dict(zip(order, torch.cat(gathered, 1).T.tolist(), strict=True))
    return [(by_row[i][0], bool(by_row[i][1])) for i in range(len(rows))]
