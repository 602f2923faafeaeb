"""The ranks' part of an evaluation: they answer the requests, and rank 0 stores the answers.

The ranks that share a model answer a batch together.  With mesh.dp=2, two such groups answer different batches at the
same time.  The batches, and the order of the stored answers, are as with mesh.dp=1.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval.answers import responses
from eval.answers.gather import gather_answers
from eval.answers.requests import Answer, Continue, Request, Score, key
from eval.variants import Variant
from longctx.infer.engine import Engine
from longctx.megatron.runtime import Runtime
from longctx.parallel.launch import Rank
from longctx.train.stop import StopRequest
from recipes.common.progress import Progress
from recipes.common.provenance import ROOT, commit_of

Answered = Sequence[tuple[Request, Answer]]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class EvalWork:
    """The inputs of every rank: plain values, checked before any rank starts.

    ``name`` labels the progress bar; answers are appended to ``file``.
    At most ``max_batch_tokens`` tokens are run at once; a longer question is run alone.  ``speed`` has the settings
    that change the speed and not the answers; it is written beside the times.
    """

    name: str
    variant: Variant
    requests: tuple[Request, ...]
    file: Path
    max_batch_tokens: int
    speed: str = ""


def run_rank(rank: Rank, work: EvalWork) -> bool:
    """Answer the requests and append the answers to ``work.file``; return True if the run was asked to stop early.

    Every rank must call it.  The first rank writes, and removes corrupt lines from the file first.
    """
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
        for own, own_tokens in answer_requests(engine, work, runtime.groups.dp.rank()):
            answers, tokens = _of_all_groups(runtime, {key(request): answer for request, answer in own}, own_tokens)
            if is_first:
                seconds = time.perf_counter() - begin if tokens else 0.0
                responses.append(work.file, answers, tokens, seconds, commit, work.speed)
                begin = time.perf_counter()
            progress.step(count=len(answers))
            # This exchange also makes all ranks wait until the answers are on disk: launched ranks read them next.
            if stop.agreed_on_all_ranks(runtime.world, runtime.device):
                break
        stop.over()
    return stop.agreed_on


def _of_all_groups(runtime: Runtime, answers: dict[str, Answer], tokens: int) -> tuple[dict[str, Answer], int]:
    """Return the answers and tokens of all data-parallel groups; all ranks of a group pass the same values."""
    mesh = runtime.mesh
    if mesh.dp == 1:
        return answers, tokens
    is_first_of_group = runtime.rank.rank % (mesh.ranks // mesh.dp) == 0
    return gather_answers(runtime.world, runtime.device, *((answers, tokens) if is_first_of_group else ({}, 0)))


def answer_requests(engine: Engine, work: EvalWork, dp_rank: int = 0) -> Iterator[tuple[Answered, int]]:
    """Yield the answers of each batch, and the number of tokens that were run for it.

    Requests to score come first, then those to continue, each kind the longest first.
    Data-parallel rank r of n (``dp_rank``) answers batches r, r + n, r + 2n, ...  All ranks yield equally often: a rank
    for which no batch is left yields no answers.
    Generated text reports 0 tokens: its length varies by variant and would distort throughput.
    """
    from eval.answers.generate import generate_texts
    from eval.answers.score import group_by_prefix, make_batches, score_batch
    from longctx.hf.config import tokenizer_of

    # 1. Log-probabilities.
    to_score = [request for request in work.requests if isinstance(request, Score)]
    dp_size = work.variant.target.mesh.dp
    for batch in _own_batches(make_batches(group_by_prefix(to_score), work.max_batch_tokens), dp_rank, dp_size):
        scores = score_batch(engine, work.variant.target.context, batch) if batch else {}
        refuse_not_finite(work, [value for value, _ in scores.values()])
        yield list(scores.items()), sum(group.tokens for group in batch)
    # 2. Texts.
    to_continue = [request for request in work.requests if isinstance(request, Continue)]
    tokenizer = tokenizer_of(work.variant.target.folder) if to_continue else None
    for prompts in _own_batches(_make_text_batches(to_continue, work.max_batch_tokens), dp_rank, dp_size):
        texts = generate_texts(engine, work.variant.target.context, tokenizer, prompts) if prompts else []
        yield list(zip(prompts, texts, strict=True)), 0


def _own_batches(batches: Iterable[list[Batch]], dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
    """Yield every ``dp_size``-th batch, from batch ``dp_rank`` on; an empty one if the last round has none."""
    in_order = list(batches)
    for first in range(0, len(in_order), dp_size):
        yield in_order[first + dp_rank] if first + dp_rank < len(in_order) else []


def refuse_not_finite(work: EvalWork, values: Sequence[float]) -> None:
    """Raise ValueError if one of ``values``, log-probabilities, is NaN or infinite.

    Such a value would be counted as a wrong or a right answer.
    """
    if count := sum(not math.isfinite(value) for value in values):
        raise ValueError(
            f"variant {work.variant.name}: {count} of {len(values)} log-probabilities are NaN or infinite: "
            f"look for damaged weights in {work.variant.target.folder}, or use model.dtype=float32"
        )


def _make_text_batches(requests: Sequence[Continue], max_tokens: int) -> Iterator[list[Continue]]:
    """Yield batches of at most ``max_tokens`` tokens, answers included, or of one request; longest prompts first."""
    remaining = sorted(requests, key=lambda request: -len(request.tokens))
    while remaining:
        batch: list[Continue] = []
        total = 0
        while remaining and (not batch or total + _room(remaining[0]) <= max_tokens):
            batch.append(remaining.pop(0))
            total += _room(batch[-1])
        yield batch


def _room(request: Continue) -> int:
    """Return the largest number of tokens that ``request`` can need: its prompt's and those of its longest answer."""
    return len(request.tokens) + request.max_new_tokens
