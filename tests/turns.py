"""Hypothesis strategies for layouts: the turns of a conversation as numbers, and the cache layout after them.

The strategies draw numbers only, and the tests build the layouts from them.  In tests beartype checks longctx's
signatures and draws from ``random`` to do so, which Hypothesis forbids inside strategies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st

from longctx.attention.layout import Layout, contiguous, documents, single, striped, zigzag

WITHIN = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}

few = settings(max_examples=50, deadline=None)

sizes = st.integers(1, 5)
lengths = st.integers(0, 17)  # includes 0, fewer rows than ranks, and lengths that the ranks do not divide
names = st.sampled_from(list(WITHIN))


@dataclass(frozen=True)
class Turn:
    """Documents of ``lengths``, each sharded by the layout ``name``; name "token" is one decoded token of ``owner``."""

    name: str = "token"
    lengths: tuple[int, ...] = (1,)
    owner: int = 0

    def layout(self, size: int) -> Layout:
        if self.name == "token":
            return single(size, self.owner % size)
        return documents(self.lengths, size, WITHIN[self.name])


@dataclass(frozen=True)
class Conversation:
    """Turns over the same documents and the same ``size`` ranks; each turn has a layout name."""

    size: int
    turns: tuple[Turn, ...]

    def layouts(self) -> list[Layout]:
        return [turn.layout(self.size) for turn in self.turns]


@st.composite
def conversations(draw: st.DrawFn, max_turns: int = 3, size: st.SearchStrategy[int] = sizes) -> Conversation:
    """Draw a conversation of one document, with decoded tokens among its turns, or of two or three documents."""
    count = draw(st.integers(1, 3))
    turn = st.builds(Turn, names, st.tuples(*[lengths] * count))
    token = st.builds(Turn, owner=st.integers(0, 4))
    one = st.one_of(turn, token) if count == 1 else turn
    return Conversation(draw(size), tuple(draw(st.lists(one, min_size=1, max_size=max_turns))))


def grown(turns: Sequence[Layout]) -> Layout:
    """Return the cache layout after ``turns``."""
    cache, *rest = turns
    for turn in rest:
        cache = cache.then(turn.after(cache))
    return cache


def decoded_tokens(first: int, count: int, size: int) -> list[Layout]:
    """Return the layouts of ``count`` decoded tokens from position ``first``, which the ranks own in turn."""
    return [single(size, position % size) for position in range(first, first + count)]
