"""Hypothesis strategies for layouts: the turns of a conversation, in numbers, and the cache that they grow.

Strategies draw numbers only, and layouts are built inside the tests: there beartype checks longctx's
signatures, which draws from ``random``, and Hypothesis forbids that inside strategies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st

from longctx.attention.layout import Layout, contiguous, documents, single, striped, zigzag

WITHIN = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}

few = settings(max_examples=50, deadline=None)

sizes = st.integers(1, 5)
lengths = st.integers(0, 17)  # 0, fewer than ranks, and lengths that do not divide
names = st.sampled_from(list(WITHIN))


@dataclass(frozen=True)
class Turn:
    """Documents of these lengths, each sharded by the layout of that name; or one token of rank ``owner``."""

    name: str = "token"
    lengths: tuple[int, ...] = (1,)
    owner: int = 0

    def layout(self, size: int) -> Layout:
        if self.name == "token":
            return single(size, self.owner % size)
        return documents(self.lengths, size, WITHIN[self.name])


@dataclass(frozen=True)
class Conversation:
    """Turns over the same documents and ranks, each sharded in its own way."""

    size: int
    turns: tuple[Turn, ...]

    def layouts(self) -> list[Layout]:
        return [turn.layout(self.size) for turn in self.turns]


@st.composite
def conversations(draw: st.DrawFn, most: int = 3, size: st.SearchStrategy[int] = sizes) -> Conversation:
    """Of one sequence, with decoded tokens among the turns, or of two or three documents."""
    count = draw(st.integers(1, 3))
    together = st.builds(Turn, names, st.tuples(*[lengths] * count))
    token = st.builds(Turn, owner=st.integers(0, 4))
    one = st.one_of(together, token) if count == 1 else together
    return Conversation(draw(size), tuple(draw(st.lists(one, min_size=1, max_size=most))))


def grown(turns: Sequence[Layout]) -> Layout:
    """The cache after all those turns."""
    cache, *rest = turns
    for turn in rest:
        cache = cache.then(turn.after(cache))
    return cache
