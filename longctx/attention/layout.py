"""Sequence sharding as a value: the positions of each document that each rank holds, in the order of its rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from longctx.attention.spans import Span, Spans, merge_spans, slice_rows
from longctx.shapes import AnyShape, Positions, Tensor


@dataclass(frozen=True)
class Layout:
    """An assignment of every position of every document to exactly one rank.

    A document of three tokens on two ranks, in zigzag order.  Rank 0 holds position 2, rank 1 positions 0 and 1:

    >>> layout = zigzag(3, 2)
    >>> [layout.positions(rank).tolist() for rank in range(2)]
    [[2], [0, 1]]
    >>> layout.ranks[1]
    (Span(start=0, length=2, step=1, document=0),)

    ``ranks[r]`` are the spans of rank r, in the order of its rows.  ``lengths[i]`` is the number of tokens of document
    i in this layout; a single sequence is one document.  ``begins[i]`` is the position of its first token: 0 by
    default, and in a later turn of a conversation the position after the earlier turns.

    A *packed* tensor holds the rows of all documents: one document after the other, each in order of position.
    `shard` takes one rank's rows out of a packed tensor, and `unshard` is the inverse.
    """

    lengths: tuple[int, ...]
    ranks: tuple[Spans, ...]
    begins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.begins:
            object.__setattr__(self, "begins", (0,) * len(self.lengths))
        rows = sum(self.rows(rank) for rank in range(self.size))
        assert rows == self.total, f"the ranks hold {rows} rows, but the documents have {self.total}"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def total(self) -> int:
        """Number of rows of all documents: the length of a packed tensor."""
        return sum(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """For each document, the position after its last token."""
        return tuple(a + n for a, n in zip(self.begins, self.lengths, strict=True))

    def rows(self, rank: int) -> int:
        """Return the number of rows that ``rank`` holds."""
        return sum(span.length for span in self.ranks[rank])

    def positions(self, rank: int) -> Positions:
        """Return the position of each row of ``rank`` within its document, as rotary embeddings need it."""
        return _concat(_list_positions(span, 0) for span in self.ranks[rank])

    def index(self, rank: int) -> Positions:
        """Return the index of each row of ``rank`` in a packed tensor."""
        packed = list(accumulate(self.lengths, initial=0))
        offsets = [first - begin for first, begin in zip(packed, self.begins, strict=False)]
        return _concat(_list_positions(span, offsets[span.document]) for span in self.ranks[rank])

    def shard(self, x: AnyShape, rank: int, dim: int = 0) -> AnyShape:
        """Return the rows of ``rank`` from the packed tensor ``x``, whose rows are in ``dim``."""
        return x.index_select(dim, self.index(rank).to(x.device))

    def unshard(self, parts: Sequence[AnyShape], dim: int = 0) -> AnyShape:
        """Return the packed tensor, given each rank's rows: the inverse of `shard`."""
        order = torch.cat([self.index(rank) for rank in range(self.size)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))

    def after(self, earlier: "Layout") -> "Layout":
        """Return the same sharding with the positions of each document continuing where ``earlier`` ends.

        In this layout, every document must begin at position 0.
        """
        ends = earlier.ends
        ranks = (tuple(replace(s, start=s.start + ends[s.document]) for s in spans) for spans in self.ranks)
        return Layout(self.lengths, tuple(ranks), ends)

    def then(self, later: "Layout") -> "Layout":
        """Return this layout extended by the next turn, ``later``, whose positions continue it (see `after`).

        On each rank, the rows of ``later`` follow the rows of this layout.
        """
        assert later.size == self.size, f"a layout over {later.size} ranks cannot extend one over {self.size}"
        assert later.begins == self.ends, f"not the next turn: it begins at {later.begins}, not at {self.ends}"
        return Layout(
            tuple(a + b for a, b in zip(self.lengths, later.lengths, strict=True)),
            tuple(merge_spans((*old, *new), self.size) for old, new in zip(self.ranks, later.ranks, strict=True)),
            self.begins,
        )

    def between(self, begin: int, end: int) -> "Layout":
        """Return the layout of positions ``begin`` to ``end`` (exclusive) of the only document; rows keep their order.

        >>> zigzag(8, 2).between(1, 6).ranks
        ((Span(start=1, length=1, step=1, document=0),), (Span(start=2, length=4, step=1, document=0),))
        """
        ranks = (tuple(part for s in spans if (part := s.between(begin, end)).length) for spans in self.ranks)
        return Layout((end - begin,), tuple(ranks), (begin,))

    def split(self, parts: int) -> "Layout":
        """Return the layout over ``size * parts`` ranks in which rank ``r * parts + i`` has run i of rank r's rows.

        The rows of a rank are cut into ``parts`` near-equal runs.
        """
        ranks = []
        for rank in range(self.size):
            cuts = [self.rows(rank) * part // parts for part in range(parts + 1)]
            ranks += [slice_rows(self.ranks[rank], *ends) for ends in pairwise(cuts)]
        return Layout(self.lengths, tuple(ranks), self.begins)

    def on_one_rank(self) -> "Layout":
        """Return a layout of the same documents on a single rank, in packed order."""
        extents = zip(self.begins, self.lengths, strict=True)
        spans = (Span(begin, n, document=d) for d, (begin, n) in enumerate(extents) if n)
        return Layout(self.lengths, (tuple(spans),), self.begins)

    def place_on(self, rank: int, size: int) -> "Layout":
        """Return this single-rank layout as a layout over ``size`` ranks: ``rank`` holds all rows, the others none."""
        return Layout(self.lengths, tuple(self.ranks[0] if r == rank else () for r in range(size)), self.begins)

    def by_document(self) -> list["Layout"]:
        """Return a list with the layout of each document alone, over the same ranks."""
        spans: list[list[list[Span]]] = [[[] for _ in self.ranks] for _ in self.lengths]
        for rank, of_rank in enumerate(self.ranks):
            for span in of_rank:
                spans[span.document][rank].append(replace(span, document=0))
        documents = zip(self.lengths, spans, self.begins, strict=True)
        return [Layout((length,), tuple(map(tuple, each)), (begin,)) for length, each, begin in documents]

    def rows_by_document(self, rank: int) -> list[Positions]:
        """Return, for each document, the indices of its rows among the rows of ``rank``."""
        firsts = accumulate((span.length for span in self.ranks[rank]), initial=0)
        rows: list[list[Tensor]] = [[] for _ in self.lengths]
        for first, span in zip(firsts, self.ranks[rank], strict=False):
            rows[span.document].append(torch.arange(first, first + span.length))
        return [_concat(pieces) for pieces in rows]

    def gather(self, parts: int) -> "Layout":
        """Return the layout in which each rank has the rows of ``parts`` consecutive ranks; the inverse of `split`."""
        groups = [self.ranks[i : i + parts] for i in range(0, self.size, parts)]
        ranks = (merge_spans([s for spans in group for s in spans], self.size // parts) for group in groups)
        return Layout(self.lengths, tuple(ranks), self.begins)


Sharding = Callable[[int, int], Layout]  # (length, size) -> layout of one document of that length over ``size`` ranks


def contiguous(length: int, size: int) -> Layout:
    """Return the layout in which rank r holds the r-th of ``size`` near-equal runs.

    The last rank has the most causal work.

    >>> [contiguous(3, 2).positions(rank).tolist() for rank in range(2)]
    [[0], [1, 2]]
    """
    return _assign_chunks(length, size, size, lambda rank: (rank,))


def zigzag(length: int, size: int) -> Layout:
    """Return the layout in which rank r holds chunks r and ``2 * size - 1 - r`` of ``2 * size`` chunks.

    ``size`` is the number of ranks.  Causal work is even across ranks (arXiv 2411.01783, 3.5.1).  Any length is
    allowed: if ``2 * size`` does not divide it, chunk lengths differ by one, and chunks of a short document may be
    empty.

    >>> [zigzag(8, 2).positions(rank).tolist() for rank in range(2)]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """
    return _assign_chunks(length, size, 2 * size, lambda rank: (rank, 2 * size - 1 - rank))


def striped(length: int, size: int) -> Layout:
    """Return the layout in which rank r of ``size`` ranks holds positions r, r + size, r + 2 * size, ...

    >>> [striped(3, 2).positions(rank).tolist() for rank in range(2)]
    [[0, 2], [1]]
    """
    counts = [len(range(rank, length, size)) for rank in range(size)]
    return Layout((length,), tuple((Span(rank, n, size),) if n else () for rank, n in enumerate(counts)))


LAYOUTS: dict[str, Sharding] = {"zigzag": zigzag, "contiguous": contiguous, "striped": striped}


def documents(lengths: Sequence[int], size: int, within: Sharding = zigzag) -> Layout:
    """Return the layout of packed documents, each sharded over ``size`` ranks by ``within``.

    Tokens attend within their own document only.  Documents of three and two tokens on two ranks:

    >>> layout = documents([3, 2], 2)
    >>> [layout.positions(rank).tolist() for rank in range(2)]
    [[2, 1], [0, 1, 0]]
    >>> [layout.index(rank).tolist() for rank in range(2)]  # in the packed tensor of five rows
    [[2, 4], [0, 1, 3]]
    """
    return side_by_side([within(length, size) for length in lengths])


def side_by_side(sequences: Sequence[Layout]) -> Layout:
    """Return one layout whose documents are ``sequences``: layouts of one document each, over the same ranks."""
    size = sequences[0].size
    ranks = (
        tuple(replace(s, document=d) for d, one in enumerate(sequences) for s in one.ranks[rank])
        for rank in range(size)
    )
    lengths, begins = (one.lengths[0] for one in sequences), (one.begins[0] for one in sequences)
    return Layout(tuple(lengths), tuple(ranks), tuple(begins))


def shard_balanced(lengths: Sequence[int], within: Sharding, rows_per_rank: Sequence[int]) -> Layout:
    """Shard new rows of several sequences so that the total rows per rank, old and new, stay even.

    Positions in the result count from 0, the first new row of each sequence (see `Layout.after`).  Rank 0 caches two
    rows, rank 1 three.  Of three new tokens, the larger share goes to rank 0:

    >>> layout = shard_balanced([3], contiguous, rows_per_rank=[2, 3])
    >>> [layout.positions(rank).tolist() for rank in range(2)]
    [[1, 2], [0]]

    ``within`` cuts each sequence into one share per rank; rank r already holds ``rows_per_rank[r]`` rows.  Sequences
    are assigned one at a time.  Larger shares go to the ranks that have received the fewest rows in this call; ties go
    to the rank with the fewest rows in total, then to the lowest rank.  Single tokens are thus assigned round-robin
    (arXiv 2411.01783, 3.6).  If every call shards one sequence, the total rows of two ranks never differ by more
    than one row, or two rows if ``within`` is zigzag.
    """
    size, layouts = len(rows_per_rank), []
    received = [0] * size  # in this call
    for length in lengths:
        plain = within(length, size)
        shares = sorted(range(size), key=lambda share: -plain.rows(share))
        takers = sorted(range(size), key=lambda rank: (received[rank], rows_per_rank[rank] + received[rank], rank))
        ranks: list[Spans] = [()] * size
        for taker, share in zip(takers, shares, strict=True):
            ranks[taker] = plain.ranks[share]
            received[taker] += plain.rows(share)
        layouts.append(Layout(plain.lengths, tuple(ranks)))
    return side_by_side(layouts)


def empty(size: int) -> Layout:
    """Return the layout of one document without rows over ``size`` ranks: the initial state of a cache."""
    return Layout((0,), ((),) * size)


def single(size: int, owner: int) -> Layout:
    """Return the layout of one row, a decoded token, on rank ``owner`` of ``size`` ranks."""
    return Layout((1,), tuple((Span(0, 1),) if rank == owner else () for rank in range(size)))


def _assign_chunks(length: int, size: int, chunks: int, chunks_of: Callable[[int], Iterable[int]]) -> Layout:
    """Cut one document of ``length`` tokens into ``chunks`` near-equal chunks, for ``size`` ranks.

    Rank r holds the chunks with the numbers ``chunks_of(r)``.
    """
    cuts = [length * chunk // chunks for chunk in range(chunks + 1)]
    spans = [Span(a, b - a) for a, b in pairwise(cuts)]
    ranks = (merge_spans([spans[chunk] for chunk in chunks_of(rank)], size) for rank in range(size))
    return Layout((length,), tuple(ranks))


def _list_positions(span: Span, offset: int) -> Positions:
    return torch.arange(span.start, span.start + span.length * span.step, span.step) + offset


def _concat(pieces: Iterable[Tensor]) -> Positions:
    return torch.cat([torch.zeros(0, dtype=torch.long), *pieces])
