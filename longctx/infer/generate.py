"""What one-shot generation adds to a session: its prompt's logits against one rank's, and all ranks' figures."""

from collections.abc import Sequence

import torch

from longctx.attention.layout import contiguous
from longctx.infer.engine import Engine
from longctx.infer.prefill import LayerDone, run_pass
from longctx.infer.session import Turn, next_logits
from longctx.parallel.strategy import STRATEGIES
from longctx.shapes import Tensor

_LOGIT_ROWS = 256  # rows compared at a time: 50 MB a side for a vocabulary of 49,152


def logit_difference(
    engine: Engine,
    alone: Engine | None,
    prompt: Tensor,
    made: Turn,
    layer_done: LayerDone = lambda: None,
) -> float | None:
    """Largest difference of the prompt's logits from those that ``alone``, one rank by itself, computes.

    ``alone`` is given on the first rank of the world only, which returns the figure; all must call this.
    ``made`` is a session's first turn, of one sequence.
    """
    chunks = []
    for hidden, layout in made.passes:
        shapes = [(layout.rows(rank), *hidden.shape[1:]) for rank in range(engine.ranks)]
        chunks.append(layout.unshard(engine.context.all_gather(hidden, shapes)))
    if engine.rank:
        return None
    whole, lone, largest = torch.cat(chunks), None, torch.zeros((), device=engine.device)
    if alone:
        whole_prompt, cache = contiguous(len(prompt), 1), alone.cache(len(prompt))
        lone = run_pass(alone, prompt, whole_prompt, cache, alone.everywhere(STRATEGIES["pass_kv"]), layer_done)
    for begin in range(0, len(prompt), _LOGIT_ROWS):
        rows = slice(begin, begin + _LOGIT_ROWS)
        ours = next_logits(engine, whole[rows])  # every tensor-parallel rank takes part in this one
        if alone and lone is not None:
            # torch's maximum keeps a NaN, where Python's max may drop it.
            largest = torch.maximum(largest, (ours - next_logits(alone, lone[rows])).abs().max())
    return float(largest) if alone else None


def gather_figures(engine: Engine, figures: Sequence[int]) -> list[list[int]]:
    """Every context rank's ``figures``, on every rank."""
    mine = torch.tensor(figures, dtype=torch.long, device=engine.device)
    return [x.tolist() for x in engine.context.all_gather(mine, [(len(figures),)] * engine.ranks)]
