"""A stage of data is a function: from a state to an iterator of (item, the state that follows it)."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

State = dict[str, Any]
"""Where a stage stands behind an item: small, JSON, and all that it takes to go on with the next item."""

Stage = Callable[[State | None], Iterator[tuple[Item, State]]]
"""Called with None it begins, with an item's state it goes on exactly behind that item."""
