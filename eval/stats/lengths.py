"""Scores by length of the text, and the effective length (RULER, arXiv 2404.06654, section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from eval.stats.outcomes import Outcomes

EFFECTIVE = 0.856  # Llama 2 7B at 4,096 tokens: RULER counts a length as effective if a model is at least as good


@dataclass(frozen=True)
class LengthScores:
    """The average score of the generated tasks at each length, and the longest length that is effective (None: none).

    A length is effective if its score and those of all shorter lengths are at least `EFFECTIVE`.
    """

    scores: Mapping[int, float]
    effective: int | None


def score_lengths(outcomes: Mapping[str, Outcomes]) -> LengthScores | None:
    """Return the scores of the tasks named ``NAME_LENGTH`` whose examples are generated.

    Each task has the same weight.  Returns None unless there are several lengths and every task has all of them.
    """
    by_length: dict[int, dict[str, float]] = {}
    for name, task in outcomes.items():
        if task.length is not None:
            by_length.setdefault(task.length, {})[name.rpartition("_")[0]] = fmean(task.values)
    if len(by_length) < 2 or len({frozenset(tasks) for tasks in by_length.values()}) > 1:
        return None
    scores = {length: fmean(by_length[length].values()) for length in sorted(by_length)}
    effective = None
    for length, score in scores.items():
        if score < EFFECTIVE:
            break
        effective = length
    return LengthScores(scores, effective)
