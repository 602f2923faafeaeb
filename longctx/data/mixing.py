"""Mix sources by weight without random draws: each source's tokens so far decide which source is next."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from longctx.data.documents import Document
from longctx.data.stage import Stage, StageWithStart, State, start_of


def beginning_with(state: State | None, source: int | None) -> State | None:
    """Return the ``state`` of `interleave` whose next document is of ``source`` (None: there is only one source)."""
    return state if state is None or source is None else {**state, "first": source}


def interleave(sources: Sequence[Stage[Document]], weights: Sequence[float]) -> StageWithStart[Document]:
    """Return the documents of all ``sources``, with numbers of tokens in proportion to ``weights``.

    The next document comes from the source with the fewest tokens relative to its weight; in a tie, from the first.  A
    source is therefore never ahead of its share by more than its last document.  When a source ends, the other sources
    continue in proportion to their weights.  A state of `beginning_with` names the source of the next document: with
    another number of epochs, a source that had ended would otherwise come first again.

    A run that resumes with other weights counts tokens from 0 again.  Otherwise a source with a larger weight would
    first give all documents, until it had its new share of all earlier tokens.

    The iteration raises ValueError for a resume state of another number of sources, and for one inside a document that
    no epoch has any more.
    """
    assert len(sources) == len(weights), "a weight for each source"
    starts = [start_of(source) for source in sources]
    start: State = {"sources": starts, "tokens": [0] * len(sources), "weights": list(weights)}

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        states, tokens = (list((state or start)[name]) for name in ("sources", "tokens"))
        if len(states) != len(sources):
            raise ValueError(
                f"the state to resume from has {len(states)} sources, but data.sources has {len(sources)}: "
                "use the same "
                "sources, or start a new run"
            )
        # The first document comes from the source that the interrupted run would have read: it may be cut already.
        shares = list((state or start).get("weights", weights))
        live = {i: source(states[i]) for i, source in enumerate(sources)}
        cut = (state or start).get("first")
        while live:
            turn = min(live, key=lambda i: tokens[i] / shares[i]) if cut is None else cut
            for one, after in live[turn]:
                cut = None
                document = replace(one, source=turn if len(sources) > 1 else None)
                tokens[turn] += len(document.tokens)
                if document.ends:
                    states[turn] = after
                    break
                yield document, {}
            else:
                if cut is not None:
                    raise ValueError(
                        f"the state to resume from is inside a document of source {cut + 1}, which data.epochs now "
                        "leaves out: use as many epochs as before, or more"
                    )
                del live[turn]
                continue
            if shares != list(weights):
                shares, tokens = list(weights), [0] * len(sources)
            yield document, {"sources": list(states), "tokens": list(tokens), "weights": shares}

    return StageWithStart(run, start)
