"""Scores over the length of a text and the depth of the fact that answers the question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.stats.outcomes import Outcomes

PARTS = 5  # equal parts of a text: its first fifth, its second fifth, ...


@dataclass(frozen=True)
class DepthScores:
    """Average ``scores[part][i]`` of ``counts[part][i]`` examples with ``lengths[i]`` tokens.

    ``part`` is the fifth of the text that has the fact, 0 at the beginning.  A score without examples is None.
    ``tasks`` are the kinds of tasks that count; each example has the same weight.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    scores: Sequence[Sequence[float | None]]
    counts: Sequence[Sequence[int]]


def score_depths(outcomes: Mapping[str, Outcomes]) -> DepthScores | None:
    """Return the scores of the tasks named ``NAME_LENGTH`` whose facts have a depth; None if there are none."""
    cells: dict[tuple[int, int], list[float]] = {}
    tasks: dict[str, None] = {}
    for name, task in outcomes.items():
        kind, _, length = name.rpartition("_")
        if task.depths:
            tasks[kind] = None
        for depth, value in zip(task.depths, task.values[: len(task.depths)], strict=True):
            cells.setdefault((min(int(depth * PARTS), PARTS - 1), int(length)), []).append(value)
    if not cells:
        return None
    lengths = sorted({length for _, length in cells})
    grid = [[cells.get((part, length), []) for length in lengths] for part in range(PARTS)]
    return DepthScores(
        tasks=list(tasks),
        lengths=lengths,
        scores=[[fmean(cell) if cell else None for cell in line] for line in grid],
        counts=[[len(cell) for cell in line] for line in grid],
    )
