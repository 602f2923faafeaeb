"""What one-shot generation adds to a session: its prompts' logits against one rank's, and all ranks' figures."""

from collections.abc import Mapping, Sequence

import torch

from longctx.config import Context, Sampling
from longctx.infer.engine import Engine
from longctx.infer.prefill import LayerDone
from longctx.infer.session import Session, Turn, next_logits
from longctx.shapes import Tensor

_LOGIT_ROWS = 256  # rows compared at a time: 50 MB a side for a vocabulary of 49,152


def logit_difference(
    engine: Engine,
    alone: Engine | None,
    prompts: Mapping[int, Sequence[int]],
    made: Turn,
    layer_done: LayerDone = lambda: None,
    chunk: int | None = None,
) -> float | None:
    """Largest difference of all prompts' logits from those that ``alone``, one rank by itself, computes.

    ``alone`` is given on the first rank of the world (of a model with dropped reductions, on all its tensor-parallel
    ranks), which returns the figure; all must call this.
    ``made`` is a session's first turn, of ``prompts``, that kept its states; ``alone`` runs ``chunk`` rows at a time.
    """
    whole = _packed_states(engine, made)
    if whole is None:
        return None
    lone, largest = None, torch.zeros((), device=engine.device)
    if alone:
        session = Session(alone, Context(chunk=chunk), Sampling())
        again = session.turn(prompts, dict.fromkeys(prompts, 0), layer_done=layer_done, keep_states=True)
        lone = _packed_states(alone, again)
    for begin in range(0, len(whole), _LOGIT_ROWS):
        rows = slice(begin, begin + _LOGIT_ROWS)
        ours = next_logits(engine, whole[rows])  # every tensor-parallel rank takes part in this one
        if alone and lone is not None:
            # torch's maximum keeps a NaN, where Python's max may drop it.
            largest = torch.maximum(largest, (ours - next_logits(alone, lone[rows])).abs().max())
    return float(largest) if alone else None


def _packed_states(engine: Engine, made: Turn) -> Tensor | None:
    """Hidden states of all rows that ``made`` prefilled, on the first rank: one sequence behind the other."""
    passes, first = [], engine.rank == 0
    for hidden, layout in made.passes:
        leaving = [hidden, *[hidden[:0]] * (engine.ranks - 1)]
        coming = [(layout.rows(rank) if first else 0, *hidden.shape[1:]) for rank in range(engine.ranks)]
        parts = engine.context.all_to_all(leaving, coming)
        if first:
            passes.append(layout.unshard(parts))
    return torch.cat(passes) if first else None


def gather_figures(engine: Engine, figures: Sequence[int]) -> list[list[int]]:
    """Every context rank's ``figures``, on every rank."""
    mine = torch.tensor(figures, dtype=torch.long, device=engine.device)
    return [x.tolist() for x in engine.context.all_gather(mine, [(len(figures),)] * engine.ranks)]
