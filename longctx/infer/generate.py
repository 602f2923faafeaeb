"""Prompt in, tokens out: a prefill over all ranks, then one token at a time against the sharded cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longctx.attention.layout import Layout, contiguous, single, striped, zigzag
from longctx.infer.prefill import Engine, LayerDone, run_pass
from longctx.infer.sample import choose_token
from longctx.megatron.model import logits
from longctx.parallel.comm import Comm
from longctx.parallel.strategy import STRATEGIES
from longctx.schema import Context, Sampling
from longctx.shapes import Tensor

LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "zigzag": zigzag,
    "contiguous": contiguous,
    "striped": striped,
}
_LOGIT_ROWS = 256  # rows compared at a time: 50 MB a side for a vocabulary of 49,152


@dataclass(frozen=True)
class Generation:
    """What a generation gave: tokens, this rank's share of the prompt's hidden states, and the figures.

    ``ttft_s`` runs from the start of the prefill to the first token; ``decode_s`` from there to the last.
    Bytes are those that this rank sent to others for attention, and holds in its cache.
    """

    tokens: list[int]
    hidden: Tensor
    layout: Layout
    ttft_s: float
    decode_s: float
    prefill_bytes: int
    decode_bytes: int
    cache_bytes: int


def prompt_layout(tokens: int, context: Context, ulysses: int, ring: int) -> Layout:
    """Who holds which of ``tokens`` prompt tokens; ranks are numbered ring rank * ulysses + ulysses rank."""
    return LAYOUTS[context.layout](tokens, ring).split(ulysses)


def generate(
    engine: Engine,
    context_group: Comm,
    prompt: Tensor,
    context: Context,
    sampling: Sampling,
    max_new_tokens: int,
    *,
    layer_done: LayerDone = lambda: None,
    token_done: Callable[[int], None] = lambda _: None,
) -> Generation:
    """Up to ``max_new_tokens`` tokens that follow ``prompt`` [total], ending behind an end token.

    The prompt's keys and values stay where the prefill put them; each decoded token belongs to the next rank
    in turn, so that the cache grows evenly (arXiv 2411.01783, 3.6).
    """
    length = len(prompt)
    layout = prompt_layout(length, context, engine.ulysses.size, engine.ring.size)
    cache = engine.cache(length + max_new_tokens)
    meet(context_group, engine.device)
    sent_before = _sent(engine)
    began = time.perf_counter()
    hidden = run_pass(engine, prompt, layout, cache, STRATEGIES[context.strategy], layer_done)
    token = _next_token(engine, context_group, hidden, layout, length - 1, sampling)
    first = time.perf_counter()
    prefill_bytes = _sent(engine) - sent_before
    tokens = [token]
    token_done(token)
    while len(tokens) < max_new_tokens and token not in engine.shape.end_tokens:
        position = length + len(tokens) - 1
        one = single(engine.ranks, _owner(position, engine))
        row = run_pass(engine, torch.tensor([token]), one, cache, STRATEGIES[context.decode])
        token = _next_token(engine, context_group, row, one, 0, sampling, position)
        tokens.append(token)
        token_done(token)
    decode_s = time.perf_counter() - first
    return Generation(
        tokens,
        hidden,
        layout,
        first - began,
        decode_s,
        prefill_bytes,
        _sent(engine) - sent_before - prefill_bytes,
        cache.bytes,
    )


def _owner(position: int, engine: Engine) -> int:
    """The rank in turn: around the ring first, so that what a ring rank caches are evenly spaced positions."""
    ring, ulysses = engine.ring.size, engine.ulysses.size
    return position % ring * ulysses + position // ring % ulysses


def logit_difference(
    engine: Engine,
    alone: Engine | None,
    context_group: Comm,
    prompt: Tensor,
    made: Generation,
    layer_done: LayerDone = lambda: None,
) -> float | None:
    """Largest difference of the prompt's logits from those that ``alone``, one rank by itself, computes.

    ``alone`` is given on the first rank of the world only, which returns the figure; all must call this.
    """
    shapes = [(made.layout.rows(rank), *made.hidden.shape[1:]) for rank in range(engine.ranks)]
    parts = context_group.all_gather(made.hidden, shapes)
    if engine.rank:
        return None
    whole, lone, largest = made.layout.unshard(parts), None, torch.zeros((), device=engine.device)
    if alone:
        whole_prompt, cache = contiguous(len(prompt), 1), alone.cache(len(prompt))
        lone = run_pass(alone, prompt, whole_prompt, cache, STRATEGIES["pass_kv"], layer_done)
    for begin in range(0, len(prompt), _LOGIT_ROWS):
        rows = slice(begin, begin + _LOGIT_ROWS)
        ours = _logits(engine, whole[rows])  # every tensor-parallel rank takes part in this one
        if alone and lone is not None:
            # torch's maximum keeps a NaN, where Python's max may drop it.
            largest = torch.maximum(largest, (ours - _logits(alone, lone[rows])).abs().max())
    return float(largest) if alone else None


@torch.inference_mode()
def _logits(engine: Engine, hidden: Tensor) -> Tensor:
    return logits(engine.model, hidden, engine.tp, engine.shape.vocabulary)


def _next_token(
    engine: Engine,
    group: Comm,
    hidden: Tensor,
    layout: Layout,
    row: int,
    sampling: Sampling,
    position: int | None = None,
) -> int:
    """The token that follows row ``row`` of the pass, chosen by the rank that holds the row, told to all."""
    held = [(layout.index(rank) == row).nonzero().flatten().tolist() for rank in range(engine.ranks)]
    mine = held[engine.rank]
    chosen = [
        choose_token(_logits(engine, hidden[i : i + 1])[0, 0], sampling, row if position is None else position)
        for i in mine
    ]
    told = group.all_gather(
        torch.tensor(chosen, dtype=torch.long, device=hidden.device), [(len(rows),) for rows in held]
    )
    return int(torch.cat(told))


def _sent(engine: Engine) -> int:
    return engine.ulysses.traffic.total + engine.ring.traffic.total


def meet(group: Comm, device: torch.device) -> None:
    """Wait for the others, so that a clock started next does not count what they did before."""
    group.all_gather(torch.zeros(1, device=device), [(1,)] * group.size)


def gather_figures(group: Comm, figures: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every rank's ``figures``, on every rank."""
    mine = torch.tensor(figures, dtype=torch.long, device=device)
    return [x.tolist() for x in group.all_gather(mine, [(len(figures),)] * group.size)]
