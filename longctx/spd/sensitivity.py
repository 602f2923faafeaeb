"""How sensitive each block is to losing its first reduction, and which kind of block that makes it."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp
from typing import TypeVar

from longctx.config import BlockClass

State = TypeVar("State")


def sensitivity(blocks: int, perplexity: Callable[[tuple[int, ...]], float]) -> list[float]:
    """Of each block, what dropping it adds to the perplexity if all later ones drop already.

    ``perplexity(dropped)`` is asked ``blocks`` + 1 times.  Source: arXiv 2502.20727, Algorithm 1.
    """
    of_suffix = [perplexity(tuple(range(first, blocks))) for first in range(blocks + 1)]
    return scores(of_suffix)


def scores(of_suffix: Sequence[float]) -> list[float]:
    """The same from perplexities: the i-th with blocks i and later dropped, the last with none."""
    return [here - behind for here, behind in pairwise(of_suffix)]


def suffix_sums(
    entering: State, blocks: int, run: Callable[[int, State, bool], State], loss: Callable[[State], float]
) -> list[float]:
    """``loss`` of the state behind all blocks, the i-th with blocks i and later dropped, the last with none.

    ``run(block, state, dropped)`` is asked half as often as by `sensitivity`: what enters a block is the same
    however many later ones drop, and is kept (``blocks`` + 1 states at once).
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
    """Of sums of losses (nats) over ``tokens`` tokens."""
    return [exp(total / tokens) for total in sums]


def kind_of(score: float, tau1: float, tau2: float) -> BlockClass:
    """In-sensitive (up to ``tau1``, in perplexity), sensitive (up to ``tau2``), or extremely sensitive block."""
    return "ISB" if score <= tau1 else "SB" if score <= tau2 else "ESB"
