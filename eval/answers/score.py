"""Log-probabilities of many continuations at once, on whatever mesh the model runs; every rank makes the same calls."""

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
from longctx.megatron.spd.likelihood import log_likelihoods
from longctx.parallel.strategy import STRATEGIES
from longctx.shapes import Tensor

_LOGIT_ROWS = 256  # rows unembedded at a time: 50 MB for a vocabulary of 49,152
Tokens = tuple[int, ...]
Wanted = tuple[int, int, int]  # document of a pass, row in it, the token that is to follow


@dataclass(frozen=True)
class PrefixGroup:
    """Requests and what has to be run for them: the ``prefix`` that all begin with, and each ``branch`` that goes on.

    A request whose tokens, but for the last, are the stem has no branch: choices of one token share a single run.
    """

    prefix: Tokens
    branches: tuple[Tokens, ...]
    requests: tuple[Score, ...]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


def prefix_groups(requests: Sequence[Score]) -> list[PrefixGroup]:
    """``requests``, those of one question together where they begin alike; the longest first."""
    questions: dict[object, list[Score]] = {}
    for i, request in enumerate(dict.fromkeys(requests)):
        # Without a question, or with another first token, it shares nothing.
        alike = (request.question, request.tokens[0]) if request.question else i
        questions.setdefault(alike, []).append(request)
    return sorted((_prefix_group(group) for group in questions.values()), key=lambda tree: -tree.tokens)


def _prefix_group(group: Sequence[Score]) -> PrefixGroup:
    inputs = sorted({request.tokens[:-1] for request in group})
    first, last = inputs[0], inputs[-1]  # of sorted ones these two have least in common
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    branches = tuple(run[common:] for run in inputs if len(run) > common)
    return PrefixGroup(first[:common], branches, tuple(group))


def batches(forest: Sequence[PrefixGroup], tokens: int) -> Iterator[list[PrefixGroup]]:
    """Trees of at most so many ``tokens`` together, at least one."""
    batch: list[PrefixGroup] = []
    for tree in forest:
        if batch and sum(one.tokens for one in batch) + tree.tokens > tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def scores(engine: Engine, context: Context, batch: Sequence[PrefixGroup]) -> dict[Score, tuple[float, bool]]:
    """The log-probability of each request's tokens, and whether each was the likeliest, on every rank.

    Two passes: all stems, packed; then all branches, against their stems' keys and values.  Only rows whose next token
    is asked for are unembedded.
    """
    caches = [engine.cache(len(tree.prefix)) for tree in batch]
    branches = [(t, branch) for t, tree in enumerate(batch) for branch in tree.branches]
    wanted: tuple[dict[Wanted, None], dict[Wanted, None]] = ({}, {})
    asked = [(t, tree, request) for t, tree in enumerate(batch) for request in tree.requests]
    places = {request: list(_places(t, tree, branches, request)) for t, tree, request in asked}
    for of_request in places.values():
        for turn, row in of_request:
            wanted[turn][row] = None
    found = [_pass(engine, context, [tree.prefix for tree in batch], caches, list(wanted[0]))]
    if branches:
        forks = [PrefixView(caches[t]) for t, _ in branches]
        found.append(_pass(engine, context, [run for _, run in branches], forks, list(wanted[1])))
    out = {}
    for request, of_request in places.items():
        each = [found[turn][row] for turn, row in of_request]
        out[request] = sum(value for value, _ in each), all(likeliest for _, likeliest in each)
    return out


def _places(
    t: int, tree: PrefixGroup, branches: Sequence[tuple[int, Tokens]], request: Score
) -> Iterator[tuple[int, Wanted]]:
    """In which pass, and where, each of the tokens of ``request`` that are scored is predicted."""
    prefix, rest = len(tree.prefix), request.tokens[len(tree.prefix) : -1]
    document = branches.index((t, rest)) if rest else -1
    for at in range(request.begin - 1, len(request.tokens) - 1):
        target = request.tokens[at + 1]
        yield (0, (t, at, target)) if at < prefix else (1, (document, at - prefix, target))


def _pass(
    engine: Engine,
    context: Context,
    documents: Sequence[Tokens],
    caches: Sequence[Cache],
    wanted: Sequence[Wanted],
) -> Mapping[Wanted, tuple[float, bool]]:
    """Run ``documents``, each behind what its cache holds; what is ``wanted`` of their rows."""
    lengths = [len(run) for run in documents]
    layout = shard_balanced(lengths, LAYOUTS[context.layout], [0] * engine.ring.size).split(engine.ulysses.size)
    packed = torch.tensor([token for run in documents for token in run])
    strategies = engine.everywhere(STRATEGIES[context.strategy])
    hidden = run_pass(engine, packed, layout, BatchCache(caches, engine.ring.rank), strategies)
    begins = list(accumulate(lengths, initial=0))
    rows = [(begins[document] + at, target) for document, at, target in wanted]
    return dict(zip(wanted, _following(engine, hidden, layout, rows), strict=True))


def _following(
    engine: Engine, hidden: Tensor, layout: Layout, rows: Sequence[tuple[int, int]]
) -> list[tuple[float, bool]]:
    """Of each (packed row, token) how likely the token is behind it; each rank sees to its own rows, and all tell."""
    held, mine = [], []
    for rank in range(engine.ranks):
        places = {row: at for at, row in enumerate(layout.index(rank).tolist())}
        held.append([i for i, (row, _) in enumerate(rows) if row in places])
        if rank == engine.rank:
            mine = [(places[rows[i][0]], rows[i][1]) for i in held[-1]]
    parts = [torch.zeros(2, 0, dtype=torch.double, device=hidden.device)]
    for begin in range(0, len(mine), _LOGIT_ROWS):
        at, targets = torch.tensor(mine[begin : begin + _LOGIT_ROWS], device=hidden.device).unbind(1)
        target = targets.unsqueeze(1)
        likely, best = log_likelihoods(engine.model, hidden[at], target, engine.tp, engine.shape.vocab_size)
        parts.append(torch.stack([likely[:, 0], (best == target)[:, 0].double()]))
    told = engine.context.all_gather(torch.cat(parts, 1), [(2, len(of_rank)) for of_rank in held])
    order = [i for of_rank in held for i in of_rank]
    by_row = dict(zip(order, torch.cat(told, 1).T.tolist(), strict=True))
    return [(by_row[i][0], bool(by_row[i][1])) for i in range(len(rows))]
