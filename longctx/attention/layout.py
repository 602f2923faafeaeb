"""A sharding is a value: which positions of which document each rank holds, in the order of its rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from longctx.shapes import Positions, Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows at positions ``start``, ``start + step``, ... of one document."""

    start: int
    length: int
    step: int = 1
    document: int = 0

    @property
    def last(self) -> int:
        return self.start + (self.length - 1) * self.step

    def part(self, first: int, end: int) -> "Span":
        """Rows ``first`` to ``end`` (exclusive) of this span."""
        return replace(self, start=self.start + first * self.step, length=end - first)


Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Layout:
    """Who holds what: ``ranks[r]`` are the spans of rank r; ``lengths`` the documents' lengths.

    Every position of every document is held by exactly one rank.  A single sequence is one document.
    A later turn's positions begin where the earlier ones ended: at ``begins`` (0 if not given).
    """

    lengths: tuple[int, ...]
    ranks: tuple[Spans, ...]
    begins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.begins:
            object.__setattr__(self, "begins", (0,) * len(self.lengths))
        held = sum(self.rows(rank) for rank in range(self.size))
        assert held == self.total, f"{held} rows are held, the documents have {self.total}"

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def total(self) -> int:
        """Rows of all documents, packed one behind the other."""
        return sum(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """The position that follows each document's last."""
        return tuple(a + n for a, n in zip(self.begins, self.lengths, strict=True))

    def rows(self, rank: int) -> int:
        return sum(span.length for span in self.ranks[rank])

    def positions(self, rank: int) -> Positions:
        """Position within its document of each row of ``rank``: what rotary angles are made from."""
        return _concatenated(_range(span, 0) for span in self.ranks[rank])

    def index(self, rank: int) -> Positions:
        """Where each row of ``rank`` lies in the packed sequence of all documents."""
        packed = list(accumulate(self.lengths, initial=0))
        offsets = [at - begin for at, begin in zip(packed, self.begins, strict=False)]
        return _concatenated(_range(span, offsets[span.document]) for span in self.ranks[rank])

    def shard(self, x: Tensor, rank: int, dim: int = 0) -> Tensor:
        """The rows of the packed ``x`` that ``rank`` holds."""
        return x.index_select(dim, self.index(rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The packed tensor from every rank's rows."""
        order = torch.cat([self.index(rank) for rank in range(self.size)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))

    def after(self, earlier: "Layout") -> "Layout":
        """The same sharding of the positions that follow ``earlier``'s, document by document."""
        ends = earlier.ends
        ranks = (tuple(replace(s, start=s.start + ends[s.document]) for s in spans) for spans in self.ranks)
        return Layout(self.lengths, tuple(ranks), ends)

    def then(self, later: "Layout") -> "Layout":
        """This layout, grown by a turn whose positions follow it (see `after`)."""
        assert later.size == self.size and later.begins == self.ends, "this is not the next turn"
        return Layout(
            tuple(a + b for a, b in zip(self.lengths, later.lengths, strict=True)),
            tuple(_joined((*old, *new), self.size) for old, new in zip(self.ranks, later.ranks, strict=True)),
            self.begins,
        )

    def split(self, parts: int) -> "Layout":
        """Each rank's rows cut into ``parts`` runs of even length, for ranks ``r * parts + part``."""
        ranks = []
        for rank in range(self.size):
            cuts = [self.rows(rank) * part // parts for part in range(parts + 1)]
            ranks += [_cut(self.ranks[rank], *ends) for ends in pairwise(cuts)]
        return Layout(self.lengths, tuple(ranks), self.begins)

    def on_one_rank(self) -> "Layout":
        """The same documents, all held by one rank."""
        each = zip(self.begins, self.lengths, strict=True)
        spans = (Span(begin, n, document=d) for d, (begin, n) in enumerate(each) if n)
        return Layout(self.lengths, (tuple(spans),), self.begins)

    def held_by(self, rank: int, size: int) -> "Layout":
        """This layout of one rank, as ``rank``'s of ``size`` ranks of which the others have nothing."""
        return Layout(self.lengths, tuple(self.ranks[0] if r == rank else () for r in range(size)), self.begins)

    def document(self, document: int) -> "Layout":
        """One of the documents, by itself."""
        ranks = (tuple(replace(s, document=0) for s in spans if s.document == document) for spans in self.ranks)
        return Layout((self.lengths[document],), tuple(ranks), (self.begins[document],))

    def rows_of(self, rank: int, document: int) -> Positions:
        """Which of the rows of ``rank`` are of ``document``."""
        firsts = accumulate((span.length for span in self.ranks[rank]), initial=0)
        held = zip(firsts, self.ranks[rank], strict=False)
        return _concatenated(torch.arange(a, a + s.length) for a, s in held if s.document == document)

    def gathered(self, parts: int) -> "Layout":
        """The layout over groups of ``parts`` neighbours, each holding its members' rows in turn."""
        groups = [self.ranks[i : i + parts] for i in range(0, self.size, parts)]
        joined = (_joined([s for spans in group for s in spans], self.size // parts) for group in groups)
        return Layout(self.lengths, tuple(joined), self.begins)


def contiguous(length: int, size: int) -> Layout:
    """Rank r holds the r-th of ``size`` equal runs.  Causal work is uneven: the last rank has most."""
    return _from_chunks(length, size, size, lambda rank: (rank,))


def zigzag(length: int, size: int) -> Layout:
    """Rank r holds chunks r and 2*size-1-r of 2*size: causal work is even (arXiv 2411.01783, 3.5.1).

    Any length will do; where it does not divide, chunks differ by one row, and may be empty.
    """
    return _from_chunks(length, size, 2 * size, lambda rank: (rank, 2 * size - 1 - rank))


def striped(length: int, size: int) -> Layout:
    """Rank r holds positions r, r + size, r + 2*size, ..."""
    counts = [len(range(rank, length, size)) for rank in range(size)]
    return Layout((length,), tuple((Span(rank, n, size),) if n else () for rank, n in enumerate(counts)))


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"zigzag": zigzag, "contiguous": contiguous, "striped": striped}


def documents(lengths: Sequence[int], size: int, within: Callable[[int, int], Layout] = zigzag) -> Layout:
    """Packed documents that do not see each other, each one sharded on its own by ``within``."""
    return side_by_side([within(length, size) for length in lengths])


def side_by_side(sequences: Sequence[Layout]) -> Layout:
    """Sequences of one document each, over the same ranks, as the documents of one layout."""
    size = sequences[0].size
    return Layout(
        tuple(one.lengths[0] for one in sequences),
        tuple(
            tuple(replace(s, document=d) for d, one in enumerate(sequences) for s in one.ranks[rank])
            for rank in range(size)
        ),
        tuple(one.begins[0] for one in sequences),
    )


def shard_balanced(lengths: Sequence[int], within: Callable[[int, int], Layout], held: Sequence[int]) -> Layout:
    """New rows of some sequences, each sharded by ``within``, so that what the ranks hold stays even.

    ``held[r]`` are the rows that rank r holds already.  Larger shares go to the ranks that got least in this
    deal, and of those to the ones that hold least: single tokens are dealt in turn, to each rank as many
    (arXiv 2411.01783, 3.6), and cached rows stay within a chunk of even over any number of turns.
    """
    size, dealt, out = len(held), [0] * len(held), []
    for length in lengths:
        plain = within(length, size)
        shares = sorted(range(size), key=lambda rank: -plain.rows(rank))
        takers = sorted(range(size), key=lambda rank: (dealt[rank], held[rank] + dealt[rank], rank))
        ranks: list[Spans] = [()] * size
        for taker, share in zip(takers, shares, strict=True):
            ranks[taker] = plain.ranks[share]
            dealt[taker] += plain.rows(share)
        out.append(Layout(plain.lengths, tuple(ranks)))
    return side_by_side(out)


def empty(size: int) -> Layout:
    """No rows yet: where a cache begins."""
    return Layout((0,), ((),) * size)


def single(size: int, owner: int) -> Layout:
    """One row, held by ``owner``: a decoded token."""
    return Layout((1,), tuple((Span(0, 1),) if rank == owner else () for rank in range(size)))


def _from_chunks(length: int, size: int, chunks: int, of_rank: Callable[[int], Iterable[int]]) -> Layout:
    cuts = [length * chunk // chunks for chunk in range(chunks + 1)]
    spans = [Span(a, b - a) for a, b in pairwise(cuts)]
    return Layout(
        (length,),
        tuple(_joined([spans[chunk] for chunk in of_rank(rank)], size) for rank in range(size)),
    )


def _joined(spans: Iterable[Span], size: int) -> Spans:
    """The same rows in as few spans as possible, so that few tiles meet.

    Two single rows ``size`` apart become one span of that step: tokens that are decoded in turn.
    """
    out: list[Span] = []
    for span in spans:
        before = out[-1] if out else None
        if not span.length:
            continue
        if before and before.document == span.document:
            gap = span.start - before.last
            step = before.step if before.length > 1 else gap
            if gap == step and step in (1, size) and (span.length == 1 or span.step == step):
                out[-1] = Span(before.start, before.length + span.length, step, before.document)
                continue
        out.append(span)
    return tuple(out)


def _cut(spans: Spans, first: int, end: int) -> Spans:
    """Rows ``first`` to ``end`` (exclusive) of the rows of all spans."""
    out, begin = [], 0
    for span in spans:
        a, b = max(first - begin, 0), min(end - begin, span.length)
        if a < b:
            out.append(span.part(a, b))
        begin += span.length
    return tuple(out)


def _range(span: Span, offset: int) -> Tensor:
    return torch.arange(span.start, span.start + span.length * span.step, span.step) + offset


def _concatenated(pieces: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *pieces])
