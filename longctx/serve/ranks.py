"""One step of serving on each rank: receive the first rank's plan, and run it in the session."""

import pickle

import torch

from longctx.infer.continuous import ContinuousSession
from longctx.infer.page_files import PageFiles
from longctx.parallel.comm import Comm, gather_bytes
from longctx.parallel.strategy import STRATEGIES
from longctx.serve.one_rank import ALL_RANKS, OneRank
from longctx.serve.rank_pages import RankPages
from longctx.serve.schedule import StepPlan

_ROOM = 128  # rows of an answer that are allocated at once


def share_plan(world: Comm, plan: StepPlan | None, device: torch.device) -> StepPlan:
    """Return the first rank's ``plan`` on every rank of ``world``; all ranks must call this, the others with None."""
    received: StepPlan = pickle.loads(gather_bytes(world, pickle.dumps(plan) if plan else b"", device)[0])
    return received


def run_plan(session: ContinuousSession, pages: RankPages, plan: StepPlan, one_rank: OneRank) -> dict[int, int]:
    """Run ``plan`` and return, by sequence, the next token of each sequence that has one; all ranks return the same.

    The plan's changes to ``pages`` and to the session's sequences are made first.  ``one_rank`` decides whether one
    ring rank or all of them prefill.  If all do, the same pass decodes, unless the strategy of decoding is a prefill
    strategy, such as ``pass_q``.

    Raises ValueError, on all ranks, for logits that are not finite.
    """
    _change_sequences(session, pages, plan)
    if not plan.prefill:
        return session.decode(plan.decode) if plan.decode else {}
    alone = one_rank.choose(session, plan.prefill, pages.rows_per_rank)
    if alone is None and plan.decode and session.decode_strategy(len(plan.decode)) not in STRATEGIES:
        return session.prefill_and_decode(plan.prefill, plan.decode)
    with one_rank.borrow_threads(session, alone):
        tokens = session.prefill(plan.prefill, alone)
    return tokens | (session.decode(plan.decode) if plan.decode else {})


def _change_sequences(session: ContinuousSession, pages: RankPages, plan: StepPlan) -> None:
    """Evict and store the pages of ``plan``, drop and add its sequences, and copy reused pages into their caches."""
    for page in plan.evict:
        pages.drop(page)
    for new_page in plan.store:
        pages.copy_from(session.sequences[new_page.sequence], new_page)
    for number in plan.drop:
        session.drop(number)
    for new in plan.add:
        room = min(new.max_new_tokens, _ROOM)  # a cache grows if an answer is longer
        sequence = session.add(new.number, len(new.prompt), room, new.sampling)
        sequence.append_prompt(new.prompt)
        sequence.prompt_logprobs = [] if new.score_prompt else None
    for number, taken in plan.take.items():
        pages.copy_to(session.sequences[number].cache, taken)


def follow(
    session: ContinuousSession, world: Comm, files: PageFiles | None = None, one_rank: OneRank = ALL_RANKS
) -> RankPages:
    """Run the first rank's plans on another rank, until one that stops; return this rank's pages.

    ``files`` stores pages on disk for the next server (None: memory only).  ``one_rank`` must equal the first rank's.
    Meanwhile, the first rank makes a `Service` and calls its `step`.
    """
    pages = RankPages(session, files)
    pages.restore(world)
    while not (plan := share_plan(world, None, session.engine.device)).stop:
        try:
            run_plan(session, pages, plan, one_rank)
        except ValueError:
            continue  # the first rank raises the same error: it ends the sequences of this plan
    return pages
