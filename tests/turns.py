"""Hypothesis strategies for layouts: one turn of a conversation, several, and the cache that they grow."""

from collections.abc import Sequence

from hypothesis import strategies as st

from longctx.attention.layout import Layout, contiguous, documents, single, striped, zigzag

WITHIN = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}

sizes = st.integers(1, 5)
lengths = st.integers(0, 23)  # 0, fewer than ranks, and lengths that do not divide
withins = st.sampled_from(list(WITHIN.values()))


@st.composite
def layouts(draw: st.DrawFn, size: st.SearchStrategy[int] = sizes, count: int | None = None) -> Layout:
    """A single sequence, or packed documents."""
    count = draw(st.integers(1, 3)) if count is None else count
    return documents([draw(lengths) for _ in range(count)], draw(size), draw(withins))


@st.composite
def turns(draw: st.DrawFn, most: int = 4) -> list[Layout]:
    """Turns over the same documents and ranks, each sharded in its own way; decoded tokens among them."""
    size, count = draw(sizes), draw(st.integers(1, 2))
    out = []
    for _ in range(draw(st.integers(1, most))):
        if count == 1 and draw(st.booleans()):
            out += [single(size, draw(st.integers(0, size - 1))) for _ in range(draw(st.integers(1, 3)))]
        else:
            out.append(draw(layouts(st.just(size), count)))
    return out


def grown(later: Sequence[Layout]) -> Layout:
    """The cache after all those turns."""
    cache, *rest = later
    for turn in rest:
        cache = cache.then(turn.after(cache))
    return cache
