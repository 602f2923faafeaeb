"""What each rank does: the same requests, answered on all ranks together, kept by the first one as they come."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import responses
from eval.answers.requests import Answer, Continue, Request, Score, key
from eval.variants import Variant
from longctx.infer.engine import Engine
from longctx.parallel.launch import Rank
from longctx.train.stop import StopRequest
from recipes.common.progress import Progress
from recipes.common.provenance import ROOT, commit_of


@dataclass(frozen=True)
class EvalWork:
    """Requests to a model on a mesh, and the file that the answers go to: plain values, checked before any rank starts.

    At most ``max_batch_tokens`` tokens are run at once, or one question.
    """

    name: str
    variant: Variant
    requests: tuple[Request, ...]
    file: Path
    max_batch_tokens: int


def run_rank(rank: Rank, work: EvalWork) -> bool:
    """One rank's part of ``work``; whether it was asked to stop before the end."""
    stop, target, first = StopRequest(), work.variant.target, rank.rank == 0
    commit = commit_of(ROOT) if first else ""
    with target.runtime(rank) as here, Progress(shown=first) as progress:
        if first and work.file.exists():
            responses.mend(work.file)  # all ranks have read it by now
        progress.start(f"{work.name}: loading", None)
        engine = target.load_engine(here)
        progress.start(f"{work.name}: requests", len(work.requests))
        began = time.perf_counter()
        for answers, tokens in answered(engine, work):
            if first:
                kept = {key(request): answer for request, answer in answers.items()}
                responses.append(work.file, kept, tokens, time.perf_counter() - began if tokens else 0.0, commit)
                began = time.perf_counter()
            for _ in answers:
                progress.step()
            # Also: all is on disk before any rank that a launcher started reads it for the next variant.
            if stop.agreed_on_all_ranks(here.world, here.device):
                break
        stop.over()
    return stop.agreed_on


def answered(engine: Engine, work: EvalWork) -> Iterator[tuple[Mapping[Any, Answer], int]]:
    """Answers, some at a time, and how many tokens were run for them; the longest first.

    Of texts that is none: how long they become is up to the variant, and its speed is not to depend on that.
    """
    from eval.answers.score import batches, prefix_groups, scores

    asked = [request for request in work.requests if isinstance(request, Score)]
    for batch in batches(prefix_groups(asked), work.max_batch_tokens):
        found = scores(engine, work.variant.target.context, batch)
        _refuse_no_numbers(work, [value for value, _ in found.values()])
        yield found, sum(tree.tokens for tree in batch)
    for texts in _texts(engine, work, [request for request in work.requests if isinstance(request, Continue)]):
        yield texts, 0


def _refuse_no_numbers(work: EvalWork, values: Sequence[float]) -> None:
    """ValueError for a log-probability that is not a number: it would be told for some answer or other."""
    if wrong := sum(map(math.isnan, values)):
        raise ValueError(
            f"variant {work.variant.name}: {wrong} of {len(values)} log-probabilities are not a number: "
            f"look for infinite or missing weights in {work.variant.target.folder}, or use model.dtype=float32"
        )


def _texts(engine: Engine, work: EvalWork, asked: Sequence[Continue]) -> Iterator[Mapping[Any, Answer]]:
    from eval.answers.generate import texts
    from longctx.hf.config import tokenizer_of

    left = sorted(asked, key=lambda request: -len(request.tokens))
    tokenizer: Any = tokenizer_of(work.variant.target.folder) if left else None
    while left:
        batch: list[Continue] = []
        total = 0
        while left and (not batch or total + len(left[0].tokens) + left[0].most <= work.max_batch_tokens):
            batch.append(left.pop(0))
            total += len(batch[-1].tokens) + batch[-1].most
        found = texts(engine, work.variant.target.context, tokenizer, batch)
        yield dict(zip(batch, found, strict=True))
