"""What became of a task's examples: plain values, for statistics and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcomes:
    """Each example was right (1) or wrong (0); guessing is right in ``chance`` of all cases, which of texts is none.

    Of a task of perplexity ``values`` are the log-likelihoods of its texts, which have so many ``words``.  ``others``
    are all of lm-eval's metrics, over all examples.
    """

    task: str
    values: tuple[float, ...]
    chance: float = 0.0
    words: tuple[float, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict)
