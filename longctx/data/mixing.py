"""Sources mixed by weight: whose turn it is follows from the tokens that each has given, not from a draw."""

from collections.abc import Iterator, Sequence

from longctx.data.documents import Document
from longctx.data.stage import Stage, State


def interleaved(sources: Sequence[Stage[Document]], weights: Sequence[float]) -> Stage[Document]:
    """Documents of all ``sources``, so that their tokens are in proportion to ``weights``.

    Next is the source with the least tokens for its weight, the first of equals.  No source is then ever ahead of
    its share by more than its own last document.  One that has ended leaves the others to their weights.
    """
    assert len(sources) == len(weights), "a weight for each source"

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        states = list(state["sources"]) if state else [None] * len(sources)
        tokens = list(state["tokens"]) if state else [0] * len(sources)
        if len(states) != len(sources):
            raise ValueError(f"the state to resume from is of {len(states)} sources, data.sources has {len(sources)}")
        live = {i: source(states[i]) for i, source in enumerate(sources)}
        while live:
            turn = min(live, key=lambda i: tokens[i] / weights[i])
            document, states[turn] = next(live[turn], (None, states[turn]))
            if document is None:
                del live[turn]
                continue
            tokens[turn] += len(document.tokens)
            yield document, {"sources": list(states), "tokens": list(tokens)}

    return run
