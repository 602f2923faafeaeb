"""The outcomes of a task's examples: plain values, for statistics and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a task, in the order of its examples.

    For accuracy, ``values`` are 1 (correct), 0, or a share between; ``chance`` is the accuracy of guessing.  It is 0
    for generated text, unless the answer is one of a few letters.  For perplexity, ``values`` are log-likelihoods of
    texts (nats) and ``words`` their lengths in words.  ``others`` are all of lm-eval's metrics, over all examples that
    were asked.

    ``margins`` has one margin per example (nats): the log-probability of the right answer, minus the largest of the
    others if there are any.  It is empty for generated text, for perplexity, and if several answers are right.
    ``depths`` has one depth per example, from 0 (the fact that answers it begins the text) to 1; it is empty unless the
    task hides such a fact.  ``available`` is the number of examples in the task's set, asked or not.  It is None for
    perplexity, and for a task that can generate any number.  ``length`` is the number of tokens that the examples of a
    generated task fill; it is None for other tasks.
    """

    task: str
    values: tuple[float, ...]
    chance: float = 0.0
    words: tuple[float, ...] = ()
    others: Mapping[str, float] = field(default_factory=dict)
    margins: tuple[float, ...] = ()
    available: int | None = None
    depths: tuple[float, ...] = ()
    length: int | None = None

    def first(self, n: int) -> "Outcomes":
        """Return the outcomes of the first ``n`` examples; ``others`` remains over all examples."""
        first = {name: getattr(self, name)[:n] for name in ("values", "words", "margins", "depths")}
        return replace(self, **first)
