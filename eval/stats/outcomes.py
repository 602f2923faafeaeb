"""The outcomes of a task's examples: plain values, for statistics and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a task, in the order of its examples.

    For accuracy, ``values`` are 1 (correct) or 0, or a share between; ``chance`` is the accuracy of guessing (0 for
    generated text).  For perplexity, ``values`` are log-likelihoods of texts (nats) and ``words`` their lengths in
    words.  ``others`` are all of lm-eval's metrics, over all examples.
    """

    task: str
    values: tuple[float, ...]
    chance: float = 0.0
    words: tuple[float, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict)
