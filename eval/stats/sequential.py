"""Examples in batches until a verdict is reached: the sizes at which one looks, and the interval that allows for it.

A verdict is looked for at most `LOOKS` times, each time with a quarter more examples.  The interval of each look is
that of a single one with the larger quantile `Z_SEQUENTIAL` (group-sequential analysis with a constant boundary;
Pocock, Biometrika 64, 1977).  Standard errors away from the truth, the differences at the looks are a Gaussian sequence
with correlation sqrt(n / m) between n and m examples.  All of them stay within `Z_SEQUENTIAL` with probability 0.95.
A task that ends early makes neighbouring looks more alike, and the probability larger.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.stats.compare import Pair, Verdict, decide
from eval.stats.interval import count_changes, score_interval

LOOKS = 20
FIRST = 100  # examples of each task at the first look
GROWTH = 1.25
Z_SEQUENTIAL = 2.8


def sizes_at(step: int, available: Mapping[str, int]) -> dict[str, int]:
    """Return how many examples of each task look number ``step`` has, from 0 on: no task has more than available."""
    wanted = round(FIRST * GROWTH**step)
    return {name: min(wanted, limit) for name, limit in available.items()}


def verdict_at_a_look(pairs: Sequence[Pair], allowed_drop: float) -> Verdict:
    """Return the verdict of one look at outcomes (baseline, variant) of tasks that have the same weight."""
    differences = [np.asarray(other, float) - np.asarray(base, float) for base, other in pairs]
    low, high = score_interval(count_changes(differences), Z_SEQUENTIAL)
    return decide(float(low), float(high), allowed_drop)
