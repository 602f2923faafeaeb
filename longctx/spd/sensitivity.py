"""Measure how much perplexity rises when a block drops its first reduction, and classify blocks by this increase."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite
from typing import TypeVar

from longctx.config import BlockClass
from longctx.perplexity import perplexity

State = TypeVar("State")


def measure_sensitivity(blocks: int, perplexity_of: Callable[[tuple[int, ...]], float]) -> list[float]:
    """For each block, return how much perplexity its dropped reduction adds if all later blocks drop theirs.

    ``perplexity_of(dropped)`` is the perplexity with the blocks of these numbers dropped.  It is called ``blocks`` + 1
    times, first with all blocks and last with none.  Source: arXiv 2502.20727, Algorithm 1.
    """
    of_suffix = [perplexity_of(tuple(range(first, blocks))) for first in range(blocks + 1)]
    return scores(of_suffix)


def scores(of_suffix: Sequence[float]) -> list[float]:
    """Return each block's sensitivity: how much dropping its reduction raises perplexity if later blocks drop theirs.

    Entry i of ``of_suffix`` is the perplexity with blocks i and later dropped, and the last entry with none dropped.  A
    block's sensitivity is its entry minus the next one.
    """
    return [with_block - without_block for with_block, without_block in pairwise(of_suffix)]


def suffix_sums(
    entering: State, blocks: int, run: Callable[[int, State, bool], State], loss: Callable[[State], float]
) -> list[float]:
    """Return ``loss`` of the model's output for every suffix of dropped blocks.

    Entry i drops blocks i and later; the last entry drops none.  ``entering`` is the state that enters block 0.
    ``run(block, state, dropped)`` returns the state after the block, and must not change ``state``.  The state that
    enters a block does not depend on later blocks, so it is computed once and saved.  ``run`` is called about half as
    often as if every suffix ran all blocks.  At most ``blocks`` + 1 states exist at once.
    """
    states = [entering]
    for block in range(blocks):
        states.append(run(block, states[-1], False))
    sums = [loss(states.pop())]
    for first in reversed(range(blocks)):
        state = states.pop()
        for block in range(first, blocks):
            state = run(block, state, True)
        sums.append(loss(state))
    return sums[::-1]


def perplexities(sums: Sequence[float], tokens: int) -> list[float]:
    """Perplexities from ``sums`` of losses (nats), each over ``tokens`` tokens; entry i drops blocks i and later.

    Raises ValueError for a perplexity that is NaN or beyond a float: no sensitivity could be computed from it.
    """
    of_suffix = [perplexity(total / tokens) for total in sums]
    wrong = [first for first, value in enumerate(of_suffix) if not isfinite(value)]
    if wrong:
        first, last = wrong[-1], len(sums) - 2  # the fewest dropped blocks
        dropped = f"with blocks {first} to {last} dropped" if first <= last else "with nothing dropped"
        raise ValueError(
            f"{dropped}, the loss is {sums[first] / tokens:.4g} nats a token, for which no perplexity can be computed: "
            "use model.dtype=float32, or text that the model can predict"
        )
    return of_suffix


def kind_of(score: float, tau1: float, tau2: float) -> BlockClass:
    """Return the class of a block of sensitivity ``score``: ISB up to ``tau1``, SB up to ``tau2``, else ESB.

    These are in-sensitive, sensitive and extremely sensitive blocks.  All three numbers are increases of perplexity.
    """
    return "ISB" if score <= tau1 else "SB" if score <= tau2 else "ESB"
