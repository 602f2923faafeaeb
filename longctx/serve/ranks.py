"""One step of serving on each rank: receive the first rank's plan, and run it in the session."""

import pickle

import torch

from longctx.infer.pages import PageStore
from longctx.infer.session import Session
from longctx.parallel.comm import Comm
from longctx.serve.schedule import StepPlan

_ROOM = 128  # rows of an answer that are allocated at once


def share_plan(world: Comm, plan: StepPlan | None, device: torch.device) -> StepPlan:
    """Return the first rank's ``plan`` on every rank of ``world``; the other ranks pass None."""
    data = pickle.dumps(plan) if plan else b""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else torch.zeros(0, device=device)
    size = world.all_gather(torch.tensor([len(data)], device=device), [(1,)] * world.size)[0]
    shapes = [(int(size),), *[(0,)] * (world.size - 1)]
    received: StepPlan = pickle.loads(bytes(world.all_gather(own.to(torch.uint8), shapes)[0].tolist()))
    return received


def open_store(session: Session) -> PageStore:
    """Return this rank's store of pages, empty."""
    return PageStore(session.engine.ring.rank, session.engine.shape.layers)


def run_plan(session: Session, pages: PageStore, plan: StepPlan) -> dict[int, int]:
    """Run ``plan`` and return the next token of each sequence that has one; the same on all ranks.

    Raises ValueError, on all ranks, for logits that are not finite.
    """
    for page in plan.evict:
        pages.drop(page)
    for new_page in plan.store:
        cache = session.sequences[new_page.sequence].cache
        pages.store(new_page.number, cache, new_page.begin, new_page.end)
    for number in plan.drop:
        session.drop(number)
    for new in plan.add:
        room = min(new.max_new_tokens, _ROOM)  # a cache grows if an answer is longer
        sequence = session.add(new.number, len(new.prompt), room, new.sampling)
        sequence.append_prompt(new.prompt)
        sequence.prompt_logprobs = [] if new.score_prompt else None
    for number, taken in plan.take.items():
        pages.copy_to(session.sequences[number].cache, taken)
    tokens: dict[int, int] = {}
    if plan.prefill:
        tokens |= session.prefill(plan.prefill)
    if plan.decode:
        tokens |= session.decode(plan.decode)
    return tokens


def follow(session: Session, world: Comm) -> PageStore:
    """Run the first rank's plans on another rank, until one that stops; return this rank's pages."""
    pages = open_store(session)
    while not (plan := share_plan(world, None, session.engine.device)).stop:
        try:
            run_plan(session, pages, plan)
        except ValueError:
            continue  # the first rank raises the same error: it ends the sequences of this plan
    return pages
