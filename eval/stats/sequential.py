"""Group-sequential analysis: looks at a growing sample until a verdict is reached; intervals cover all looks.

There are at most `LOOKS` looks, each with a quarter more examples than the one before.  The interval of a look is that
of a single test with the larger quantile `Z_SEQUENTIAL`, a constant boundary (Pocock, Biometrika 64, 1977).  The errors
of the differences, in standard errors, are a Gaussian sequence with correlation sqrt(n / m) between looks at n and m
examples.  All errors stay within `Z_SEQUENTIAL` with probability 0.95.  If a task runs out of examples, later looks are
more alike, and the true coverage is above 0.95.
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
    """Return how many examples of each task look ``step`` analyses; looks are counted from 0.

    A look is one analysis of the growing sample.  The number is at most that of the task's ``available`` examples.
    """
    wanted = round(FIRST * GROWTH**step)
    return {name: min(wanted, limit) for name, limit in available.items()}


def verdict_at_a_look(pairs: Sequence[Pair], allowed_drop: float) -> Verdict:
    """Return the verdict of one look, that is, of one analysis of a growing sample; each task has the same weight.

    ``pairs`` are each task's outcomes, of the baseline and of the variant.
    """
    differences = [np.asarray(other, float) - np.asarray(base, float) for base, other in pairs]
    low, high = score_interval(count_changes(differences), Z_SEQUENTIAL)
    return decide(float(low), float(high), allowed_drop)
