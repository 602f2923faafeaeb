"""Random outcomes of paired examples, as the arrays that intervals take."""

from collections.abc import Sequence

import numpy as np

from eval.stats.interval import Changes

Rates = Sequence[tuple[float, float]]  # by task, the shares of examples that fall and that rise


def draw_counts(random: np.random.Generator, n: Sequence[int], rates: Rates, runs: int) -> np.ndarray:
    """Return how many of ``n[task]`` examples fall and rise, [runs tasks 2]."""
    tasks = [random.multinomial(size, (p, q, 1 - p - q), runs) for size, (p, q) in zip(n, rates, strict=True)]
    return np.stack(tasks, 1)[..., :2].astype(float)


def changes(counts: np.ndarray, n: Sequence[int]) -> Changes:
    """Return `Changes` with ``counts`` [... tasks 2] of ``n[task]`` examples; each task has the same weight."""
    return Changes(counts[..., 0], counts[..., 1], np.asarray(n, float), np.full(len(n), 1 / len(n)))


def true_difference(rates: Rates) -> float:
    return float(np.mean([q - p for p, q in rates]))
