"""Rows of one rank as spans of positions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one rank, at evenly spaced positions of one document.

    ``Span(4, 3, step=2)`` is three rows, at positions 4, 6 and 8 of document 0.  A row is one token that a rank
    holds.  A position counts tokens from the beginning of their document.
    """

    start: int
    length: int
    step: int = 1
    document: int = 0

    @property
    def last(self) -> int:
        """Position of the last row."""
        return self.start + (self.length - 1) * self.step

    def part(self, first: int, end: int) -> "Span":
        """Return rows ``first`` to ``end`` (exclusive) of this span."""
        return replace(self, start=self.start + first * self.step, length=end - first)

    def between(self, begin: int, end: int) -> "Span":
        """Return the part of this span at positions ``begin`` to ``end`` (exclusive); it may have no rows."""
        first, after = (min(max(0, -((self.start - at) // self.step)), self.length) for at in (begin, end))
        return self.part(first, after)


Spans = tuple[Span, ...]


def merge_spans(spans: Iterable[Span], size: int) -> Spans:
    """Return the same rows, in the same order, in fewer spans where possible: fewer spans give fewer tiles.

    ``size`` is the number of ranks.  Two consecutive spans are merged if they make one span of step 1 or ``size``.
    Step ``size`` comes from round-robin decoding.  Empty spans are dropped.
    """
    out: list[Span] = []
    for span in (span for span in spans if span.length):
        previous = out[-1] if out else None
        if previous and previous.document == span.document:
            gap = span.start - previous.last
            step = previous.step if previous.length > 1 else gap
            if gap == step and step in (1, size) and (span.length == 1 or span.step == step):
                out[-1] = Span(previous.start, previous.length + span.length, step, previous.document)
                continue
        out.append(span)
    return tuple(out)


def slice_rows(spans: Spans, first: int, end: int) -> Spans:
    """Return the spans of rows ``first`` to ``end`` (exclusive), numbered from 0 through all ``spans`` in order."""
    out, begin = [], 0
    for span in spans:
        a, b = max(first - begin, 0), min(end - begin, span.length)
        if a < b:
            out.append(span.part(a, b))
        begin += span.length
    return tuple(out)
