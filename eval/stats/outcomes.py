"""The outcomes of a task's examples: plain values, for statistics and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a task, in the order of its examples.

    For accuracy, ``values`` are 1 (correct) or 0, or a share between; ``chance`` is the accuracy of guessing (0 for
    generated text).  For perplexity, ``values`` are log-likelihoods of texts (nats) and ``words`` their lengths in
    words.  ``others`` are all of lm-eval's metrics, over all examples.

    ``margins`` has one margin per example (nats): the log-probability of the right answer, minus the largest of the
    others if there are any.  It is empty for generated text, for perplexity, and if several answers are right.
    ``available`` is the number of examples that the task has, asked or not; None if it can generate any number.
    """

    task: str
    values: tuple[float, ...]
    chance: float = 0.0
    words: tuple[float, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict)
    margins: tuple[float, ...] = ()
    available: int | None = None

    def first(self, n: int) -> "Outcomes":
        """Return the outcomes of the first ``n`` examples."""
        return replace(self, values=self.values[:n], words=self.words[:n], margins=self.margins[:n])
