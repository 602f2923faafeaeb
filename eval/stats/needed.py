"""The number of examples with which a verdict is likely, for tasks that have a limited number of examples."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from eval.stats.interval import Changes, Numbers, score_limit

POWER = 0.8
_MAX_EXAMPLES = 10**7  # the limit for a task that can make any number
_RATIOS = (1.3, 1.02)  # ratio of one tried size to the one before: a coarse search, then a fine one


def examples_needed(
    changes: Changes, available: Sequence[int | None], allowed_drop: float, z: float
) -> tuple[int, ...] | None:
    """Return how many examples of each task, those at hand included, lead to a verdict in 80 % of cases.

    Returns None if all ``available`` examples (None: any number) are too few.  The calculation assumes that further
    examples change as often as those at hand, and that the variant loses nothing.  If the observed loss is above
    ``allowed_drop``, it assumes a loss of twice ``allowed_drop``.  Every task gives the same number of examples, or all
    that it has.  ``z`` is the normal quantile of the interval.
    """
    given = [_MAX_EXAMPLES if limit is None else limit for limit in available]
    limits = np.maximum(np.array(given, float), changes.n)
    first, last = changes.n.min(), limits.max()
    for ratio in _RATIOS:
        sizes = np.append(first * ratio ** np.arange(np.log(last / first) / np.log(ratio)), last)
        totals = np.clip(np.ceil(sizes)[:, None], changes.n, limits)
        decides = _decides(changes, totals, allowed_drop, z)
        if not decides.any():
            return None
        at = int(decides.argmax())
        first, last = sizes[max(at - 1, 0)], sizes[at]
    return tuple(int(total) for total in totals[at])


def _decides(changes: Changes, totals: Numbers, allowed_drop: float, z: float) -> NDArray[np.bool_]:
    """Return, for each row of ``totals``, whether these numbers of examples give a verdict with probability `POWER`.

    ``totals`` is [sizes tasks]: a row has the number of examples of each task.
    """
    lost, won, n, weights = changes.lost, changes.won, changes.n, changes.weights
    # 1. The rates of further examples: as observed, plus one extra change divided among the tasks, since a small
    # number of changes often underestimates the rate.  ``weights`` is the size of a change, divided by the
    # number of tasks.
    side = 1 if (weights * (won - lost) / n).sum() < -allowed_drop else -1
    drop = 2 * allowed_drop / (weights * len(n)) if side > 0 else np.zeros_like(n)
    changed = np.clip((lost + won + 1 / len(n)) / (n + 2 / len(n)), drop, 1)
    falls, rises = (changed + drop) / 2, (changed - drop) / 2
    # 2. The end of the interval that these rates lead to on average, and its standard deviation.
    more = totals - n
    end = score_limit(Changes(lost + more * falls, won + more * rises, totals, weights), z, side)
    spread = np.sqrt((weights**2 * more * (changed - drop**2) / totals**2).sum(-1))
    return np.asarray(side * (end + allowed_drop) + NormalDist().inv_cdf(POWER) * spread < 0)
