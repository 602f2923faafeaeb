"""The ranks' part of an evaluation: all ranks answer the same requests together, the first one stores the answers."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.answers import responses
from eval.answers.requests import Answer, Continue, Request, Score, key
from eval.variants import Variant
from longctx.infer.engine import Engine
from longctx.parallel.launch import Rank
from longctx.train.stop import StopRequest
from recipes.common.progress import Progress
from recipes.common.provenance import ROOT, commit_of

Answered = Sequence[tuple[Request, Answer]]


@dataclass(frozen=True)
class EvalWork:
    """The inputs of every rank: plain values, checked before any rank starts.

    ``name`` is shown as progress; answers are appended to ``file``.
    At most ``max_batch_tokens`` tokens are run at once, or one question if it is longer.
    """

    name: str
    variant: Variant
    requests: tuple[Request, ...]
    file: Path
    max_batch_tokens: int


def run_rank(rank: Rank, work: EvalWork) -> bool:
    """Answer the requests on one rank; return whether it was asked to stop before the end."""
    stop, target, is_first = StopRequest(), work.variant.target, rank.rank == 0
    commit = commit_of(ROOT) if is_first else ""
    with target.runtime(rank) as runtime, Progress(shown=is_first) as progress:
        # 1. Load the model.  Every rank has read the stored answers by now: the file may be rewritten.
        if is_first and work.file.exists():
            responses.remove_corrupt_lines(work.file)
        progress.start(f"{work.name}: loading", None)
        engine = target.load_engine(runtime)
        # 2. Answer batch by batch; the time of generated texts is not recorded.
        progress.start(f"{work.name}: requests", len(work.requests))
        begin = time.perf_counter()
        for answers, tokens in answer_requests(engine, work):
            if is_first:
                by_key = {key(request): answer for request, answer in answers}
                responses.append(work.file, by_key, tokens, time.perf_counter() - begin if tokens else 0.0, commit)
                begin = time.perf_counter()
            for _ in answers:
                progress.step()
            # This exchange also makes all ranks wait until the answers are on disk: launched ranks read them next.
            if stop.agreed_on_all_ranks(runtime.world, runtime.device):
                break
        stop.over()
    return stop.agreed_on


def answer_requests(engine: Engine, work: EvalWork) -> Iterator[tuple[Answered, int]]:
    """Yield answers in batches, the longest requests first, and the tokens that were run for each batch.

    Generated text reports 0 tokens: its length varies by variant and would distort throughput.
    """
    from eval.answers.score import group_by_prefix, make_batches, score_batch

    to_score = [request for request in work.requests if isinstance(request, Score)]
    for batch in make_batches(group_by_prefix(to_score), work.max_batch_tokens):
        scores = score_batch(engine, work.variant.target.context, batch)
        refuse_not_finite(work, [value for value, _ in scores.values()])
        yield list(scores.items()), sum(group.tokens for group in batch)
    for texts in _continue_in_batches(engine, work, [one for one in work.requests if isinstance(one, Continue)]):
        yield texts, 0


def refuse_not_finite(work: EvalWork, values: Sequence[float]) -> None:
    """Raise ValueError if a log-probability is NaN or infinite: it would be counted as a wrong or a right answer."""
    if count := sum(not math.isfinite(value) for value in values):
        raise ValueError(
            f"variant {work.variant.name}: {count} of {len(values)} log-probabilities are NaN or infinite: "
            f"look for damaged weights in {work.variant.target.folder}, or use model.dtype=float32"
        )


def _continue_in_batches(engine: Engine, work: EvalWork, requests: Sequence[Continue]) -> Iterator[Answered]:
    """Yield the texts of ``requests`` in batches, the longest prompts first."""
    from eval.answers.generate import generate_texts
    from longctx.hf.config import tokenizer_of

    remaining = sorted(requests, key=lambda request: -len(request.tokens))
    tokenizer = tokenizer_of(work.variant.target.folder) if remaining else None
    while remaining:
        batch: list[Continue] = []
        total = 0
        while remaining and (not batch or total + _room(remaining[0]) <= work.max_batch_tokens):
            batch.append(remaining.pop(0))
            total += _room(batch[-1])
        texts = generate_texts(engine, work.variant.target.context, tokenizer, batch)
        yield list(zip(batch, texts, strict=True))


def _room(request: Continue) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(request.tokens) + request.max_new_tokens
