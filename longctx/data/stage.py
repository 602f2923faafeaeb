"""Types of the data pipeline: a stage maps a resume state to an iterator of (item, next resume state)."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

State = dict[str, Any]
"""Resume state after an item: a small JSON object, sufficient to continue with the next item."""

Stage = Callable[[State | None], Iterator[tuple[Item, State]]]
"""A stage called with None starts from the beginning; called with an item's state, it starts after that item."""
