"""Checks of a one-shot generation: the prompts' logits against one rank's, and numbers gathered from all ranks."""

from collections.abc import Mapping, Sequence

import torch

from longctx.config import Context, Sampling
from longctx.infer.engine import Engine, next_logits
from longctx.infer.prefill import LayerDone
from longctx.infer.session import Session
from longctx.infer.turn import Turn
from longctx.megatron.model import rows_of_logits
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Tensor


def logit_difference(
    engine: Engine,
    alone: Engine | None,
    prompts: Mapping[int, Sequence[int]],
    turn: Turn,
    layer_done: LayerDone = lambda: None,
    chunk: int | None = None,
    world: Comm | None = None,
) -> float | None:
    """Return the largest absolute difference of all prompts' logits from those of ``alone``, the model on one rank.

    ``turn`` is the first turn of a session with these ``prompts``, run with ``keep_states``.  All ranks must call this.
    Only the first rank of the world passes ``alone`` (see `load_alone`).  With dropped or rounded reductions, all ranks
    of the first tensor-parallel group do.  These ranks return the difference, and the others None.  ``alone`` prefills
    ``chunk`` tokens a pass (None: all) and calls ``layer_done`` after each layer's attention.  If ``world`` has all
    ranks, the ranks that wait for ``alone`` hear from it after each layer, so that no wait reaches a time limit.

    Raises ValueError, on the ranks that compare, if a logit is NaN or infinite.
    """
    states = _gather_states(engine, turn)
    states_alone, largest = None, torch.zeros((), device=engine.device)

    def is_over(end: int) -> bool:
        """Exchange ``end`` with all ranks; return True if one of them sent 1."""
        own = torch.tensor([end], device=engine.device)
        return bool(torch.cat(world.all_gather(own, [(1,)] * world.size)).any()) if world else True

    def tell_of_layer() -> None:
        layer_done()
        is_over(0)

    # 1. The same prompts on one rank.
    if alone:
        session = Session(alone, Context(chunk=chunk), Sampling())
        turn_alone = session.turn(prompts, dict.fromkeys(prompts, 0), layer_done=tell_of_layer, keep_states=True)
        states_alone = _gather_states(alone, turn_alone)
        is_over(1)
    while not alone and not is_over(0):
        pass
    if states is None:
        return None

    # 2. Compare logits, a block of rows at a time.
    block = rows_of_logits(engine.shape.vocab_size)
    for begin in range(0, len(states), block):
        rows = slice(begin, begin + block)
        sharded = next_logits(engine, states[rows])  # all tensor-parallel ranks take part
        if alone and states_alone is not None:
            # torch's maximum keeps a NaN, where Python's max may drop it.
            largest = torch.maximum(largest, (sharded - next_logits(alone, states_alone[rows])).abs().max())
    return finite_figure(largest) if alone else None


def finite_figure(difference: Float[Tensor, ""]) -> float:
    """Return ``difference``, of logits, as a number.  Raises ValueError if it is NaN or infinite."""
    if not difference.isfinite():
        raise ValueError(
            f"the prompt's logits cannot be compared, since some are NaN or infinite (difference {float(difference)}): "
            "use model.dtype=float32, or a checkpoint whose weights are not damaged"
        )
    return float(difference)


def _gather_states(engine: Engine, turn: Turn) -> Float[Tensor, "s b hidden"] | None:
    """Return the prefilled rows' hidden states on the first rank, packed by pass and sequence; None on the others."""
    passes, first = [], engine.rank == 0
    for hidden, layout in turn.passes:
        parts_to_send = [hidden, *[hidden[:0]] * (engine.ranks - 1)]
        shapes = [(layout.rows(rank) if first else 0, *hidden.shape[1:]) for rank in range(engine.ranks)]
        parts = engine.context.all_to_all(parts_to_send, shapes)
        if first:
            passes.append(layout.unshard(parts))
    return torch.cat(passes) if first else None


def gather_figures(engine: Engine, figures: Sequence[int]) -> list[list[int]]:
    """Return the ``figures`` of every context rank, in rank order, on every rank; each passes equally many."""
    mine = torch.tensor(figures, dtype=torch.long, device=engine.device)
    return [x.tolist() for x in engine.context.all_gather(mine, [(len(figures),)] * engine.ranks)]
