"""Types of the data pipeline: a stage maps a resume state to an iterator of (item, next resume state)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

State = dict[str, Any]
"""Resume state after an item: a small JSON object, sufficient to continue with the next item."""

Stage = Callable[[State | None], Iterator[tuple[Item, State]]]
"""A stage called with None starts from the beginning; called with an item's state, it starts after that item."""


@dataclass(frozen=True)
class StageWithStart(Generic[Item]):
    """A stage that knows the resume state ``start`` before its first item.

    A run that has used only a part of the first item saves it: a resumed run then finds out whether the text has
    changed.
    """

    run: Stage[Item]
    start: State

    def __call__(self, state: State | None) -> Iterator[tuple[Item, State]]:
        """Iterate as ``run`` does."""
        return self.run(state)


def start_of(stage: Stage[Any]) -> State | None:
    """Return the resume state before the first item of ``stage``; None if it knows of none."""
    return stage.start if isinstance(stage, StageWithStart) else None
