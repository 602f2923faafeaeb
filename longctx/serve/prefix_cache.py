"""The first rank's record of the pages that prompts share: which are stored, used and evicted.  It has no tensors."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from longctx.attention.layout import Layout

Tokens = tuple[int, ...]


ROOT = -1  # number of the page before the first one of a text


class NewPage(NamedTuple):
    """A page to copy from the cache of ``sequence``: its positions ``begin`` to ``end`` (exclusive).

    ``number`` is the page's number, and ``before`` that of the page before it (`ROOT` for the first page of a text).
    """

    number: int
    sequence: int
    begin: int
    end: int
    before: int = ROOT


class TakenPage(NamedTuple):
    """The first ``tokens`` tokens of the stored page ``number``, to copy into the cache of a sequence."""

    number: int
    tokens: int


class StoredPage(NamedTuple):
    """A page that an earlier process stored: its ``tokens``, and the number of its ``rows`` on each ring rank.

    ``before`` is the number of the page before it (`ROOT` for the first page of a text).
    """

    number: int
    before: int
    tokens: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(eq=False)
class _Page:
    """A page, identified by its ``tokens`` and the page ``before`` it.

    It is thus identified by all tokens of a text up to ``end``.

    ``rows`` has its number of rows on each ring rank.  ``users`` counts the running sequences that reuse the page or
    have computed it.  ``restored`` is True if an earlier process stored it.  ``following`` has the pages after it by
    their tokens, and ``in_order`` these tokens in ascending order.
    """

    number: int
    before: _Page | None
    tokens: Tokens
    end: int
    rows: Sequence[int]
    users: int = 0
    restored: bool = False
    following: dict[Tokens, _Page] = field(default_factory=dict)
    in_order: list[Tokens] = field(default_factory=list)

    def attach(self) -> None:
        """Let the page before this one know it."""
        assert self.before
        self.before.following[self.tokens] = self
        insort(self.before.in_order, self.tokens)

    def detach(self) -> None:
        """Let the page before this one forget it."""
        assert self.before
        del self.before.following[self.tokens]
        del self.before.in_order[bisect_left(self.before.in_order, self.tokens)]

    def closest(self, tokens: Tokens) -> tuple[int, Tokens]:
        """Return the tokens of the following page that agrees longest with ``tokens``, after the number of equal ones.

        In ascending order, such a page is next to the place of ``tokens``.  Without a page, the result is (0, ()).
        """
        place = bisect_left(self.in_order, tokens)
        both_sides = self.in_order[max(0, place - 1) : place + 1]
        return max(((count_equal(one, tokens), one) for one in both_sides), default=(0, ()))


@dataclass
class _Sequence:
    """A running sequence; ``page`` is the last of its stored pages, and ``takes`` says if it may reuse pages."""

    prompt: Sequence[int]
    takes: bool
    page: _Page


class PrefixCache:
    """Decides which pages are stored, evicted and reused; a page has ``page_tokens`` tokens.

    Each of ``ranks`` ring ranks stores at most ``limit`` rows.  A sequence's tokens are stored page by page, from the
    first one.  Pages with equal tokens and equal tokens before them are stored once.  A dictionary hashes and compares
    the tokens, so that no two pages are confused.  If a prompt ends or differs within a page, it reuses the page's
    first tokens, at least a quarter of them.  A page stays while a running sequence uses it.  Other pages leave when
    room is needed: the least recently used first, and a page only after the pages that follow it.  ``asked``
    counts the tokens of prompts that may reuse pages, ``reused`` the tokens that they took from pages, ``evicted`` the
    evicted pages.  ``reused_restored`` counts the reused tokens in pages that an earlier process stored.
    """

    def __init__(self, page_tokens: int, limit: int, ranks: int) -> None:
        self.page_tokens, self.limit = page_tokens, limit
        self.rows = [0] * ranks
        self.asked = self.reused = self.reused_restored = self.evicted = 0
        self._root = _Page(ROOT, None, (), 0, ())
        self._unused: OrderedDict[int, _Page] = OrderedDict()  # the least recently used first
        self._unused_rows = [0] * ranks
        self._sequences: dict[int, _Sequence] = {}
        self._added = 0
        self._store: list[NewPage] = []
        self._evict: list[int] = []

    @property
    def hit_rate(self) -> float:
        """Reused tokens as a share of the tokens of all prompts that may reuse pages; 0 without such prompts."""
        return self.reused / self.asked if self.asked else 0.0

    def restore(self, pages: Sequence[StoredPage]) -> None:
        """Add the ``pages`` of an earlier process, before any other page is added.

        They are numbered from 0, and `fitting` says that there is room for all of them.  A page stands later in the
        list than the page that its text continues.
        """
        known = {ROOT: self._root}
        for number, before, tokens, rows in pages:
            parent = known[before]
            self.rows = [stored + new for stored, new in zip(self.rows, rows, strict=True)]
            known[number] = _Page(number, parent, tokens, parent.end + len(tokens), rows, restored=True)
            known[number].attach()
        for page in reversed([*known.values()][1:]):
            self._set_unused(page)
        self._added = len(pages)

    def enter(self, number: int, prompt: Sequence[int], *, takes: bool = True) -> None:
        """Add the running sequence ``number``, which begins with ``prompt``.

        With ``takes=False`` it reuses no pages; the pages that it computes are stored all the same.
        """
        self._sequences[number] = _Sequence(prompt, takes, self._root)
        self.asked += len(prompt) if takes else 0

    def leave(self, number: int) -> None:
        """Remove the running sequence ``number``, if it is known; its pages stay stored until their room is needed."""
        one = self._sequences.pop(number, None)
        page = one.page if one else self._root
        while page.before:
            page.users -= 1
            if not page.users:
                self._set_unused(page)
            page = page.before

    def can_take(self, number: int, cached: int) -> bool:
        """Return True if sequence ``number``, which has ``cached`` tokens, may reuse a whole page that follows them.

        This does not look for the page.  The sequence may if its prompt may reuse pages, and the cached tokens end
        where its last page ends.  The last token of a prompt is not reused: its row gives the first token of the
        answer.
        """
        one = self._sequences[number]
        return one.takes and cached == one.page.end and cached + self.page_tokens < len(one.prompt)

    def page_at(self, number: int, cached: int) -> tuple[int, Tokens] | None:
        """Return (number of the page before, tokens) of the page that follows the pages of sequence ``number``.

        The result is None if the first token that is not cached, prompt[cached], lies outside this page, if the prompt
        ends before the end of the page, or if pages are not stored.
        """
        one = self._sequences[number]
        begin, end = one.page.end, one.page.end + self.page_tokens
        if not (self.limit and begin <= cached < end <= len(one.prompt)):
            return None
        return one.page.number, tuple(one.prompt[begin:end])

    def take(self, number: int, cached: int) -> tuple[TakenPage, ...]:
        """Reuse the whole stored pages that continue the prompt after ``cached`` tokens; return them in order.

        The pages are not evicted while the sequence ``number``, which has this prompt, runs.
        """
        one, taken = self._sequences[number], []
        while self.can_take(number, cached):
            page = one.page.following.get(tuple(one.prompt[cached : cached + self.page_tokens]))
            if not page:
                break
            self._use(one, page)
            taken.append(self._count_reused(page, self.page_tokens))
            cached = page.end
        return tuple(taken)

    def take_part(self, number: int, cached: int) -> TakenPage | None:
        """Reuse the first tokens of the stored page that agrees longest with the prompt after ``cached`` tokens.

        Return these tokens, which the caller must copy in this step: the page may be evicted in the next one.  The
        result is None for less than a quarter of a page, since a copy also costs time.  Call it after `take`, for a
        sequence that computes the rest of the page now.
        """
        one = self._sequences[number]
        if not (one.takes and cached == one.page.end):
            return None
        left = tuple(one.prompt[cached : min(cached + self.page_tokens, len(one.prompt) - 1)])
        tokens, key = one.page.closest(left)
        if 4 * tokens < self.page_tokens:
            return None
        page = one.page.following[key]
        if page.number in self._unused:
            self._unused.move_to_end(page.number)
        return self._count_reused(page, tokens)

    def _count_reused(self, page: _Page, tokens: int) -> TakenPage:
        self.reused += tokens
        self.reused_restored += page.restored * tokens
        return TakenPage(page.number, tokens)

    def give(self, number: int, tokens: Sequence[int], layout: Layout) -> None:
        """Record the whole pages that sequence ``number`` has cached since the last call, until there is no more room.

        The next `changes` lists the new ones, to be stored.  An unknown sequence is ignored.  ``tokens`` are the tokens
        of the prompt and of the answer so far; ``layout`` shards the cached ones.
        """
        one = self._sequences.get(number)
        while one and (end := one.page.end + self.page_tokens) <= layout.total:
            key = tuple(tokens[one.page.end : end])
            page = one.page.following.get(key) or self._add(number, one.page, key, layout)
            if not page:
                return
            self._use(one, page)

    def changes(self) -> tuple[tuple[NewPage, ...], tuple[int, ...]]:
        """Return the pages to store and the pages to evict since the last call; every rank evicts first."""
        changes = tuple(self._store), tuple(self._evict)
        self._store, self._evict = [], []
        return changes

    def distrust(self, numbers: Collection[int]) -> None:
        """Remove the sequences ``numbers``, whose rows may be wrong, and evict every page without other users."""
        for number in numbers:
            self.leave(number)
        while self._evict_one():
            pass

    def _use(self, one: _Sequence, page: _Page) -> None:
        """Count the sequence ``one`` as a user of ``page``, which follows the sequence's last page and replaces it."""
        page.users += 1
        if self._unused.pop(page.number, None):
            self._unused_rows = _difference(self._unused_rows, page.rows)
        one.page = page

    def _set_unused(self, page: _Page) -> None:
        """Let ``page``, which no running sequence uses, be evicted, after all pages that may be already."""
        self._unused[page.number] = page
        self._unused_rows = [free + new for free, new in zip(self._unused_rows, page.rows, strict=True)]

    def _add(self, sequence: int, before: _Page, tokens: Tokens, layout: Layout) -> _Page | None:
        """Add a page, to be copied from the cache of ``sequence``; evict others for it if needed.

        Return the page, or None if there is no room; no page is evicted then.
        """
        if not self.limit:
            return None
        begin, end = before.end, before.end + len(tokens)
        whole = layout.between(begin, end)
        rows = [whole.rows(rank) for rank in range(whole.size)]
        in_use = _difference(self.rows, self._unused_rows)
        if any(used + new > self.limit for used, new in zip(in_use, rows, strict=True)):
            return None  # even without all other pages
        while any(stored + new > self.limit for stored, new in zip(self.rows, rows, strict=True)):
            self._evict_one()
        page = _Page(self._added, before, tokens, end, rows)
        page.attach()
        self._added += 1
        self.rows = [stored + new for stored, new in zip(self.rows, rows, strict=True)]
        self._store.append(NewPage(page.number, sequence, begin, end, before.number))
        return page

    def _evict_one(self) -> bool:
        """Evict the least recently used page without users; return False if there is none."""
        if not self._unused:
            return False
        _, page = self._unused.popitem(last=False)
        assert page.before and not page.following, "a page leaves after those that follow it"
        page.detach()
        self.rows = _difference(self.rows, page.rows)
        self._unused_rows = _difference(self._unused_rows, page.rows)
        self._evict.append(page.number)
        self.evicted += 1
        return True


def fitting(pages: Sequence[StoredPage], limit: int, ranks: int) -> list[int]:
    """Return the numbers of those ``pages`` that fit into ``limit`` rows on each of ``ranks`` ranks, the first ones.

    A page stands later in the list than the page that its text continues; without that page, it is left out, too.
    """
    fit, rows = {ROOT}, [0] * ranks
    for one in pages:
        after = [stored + new for stored, new in zip(rows, one.rows, strict=True)]
        if one.before in fit and max(after) <= limit:
            fit.add(one.number)
            rows = after
    return sorted(fit - {ROOT})


def count_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of first tokens that ``one`` and ``other`` have in common.

    >>> count_equal((1, 2, 3), (1, 2, 4, 3))
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _difference(rows: Sequence[int], fewer: Sequence[int]) -> list[int]:
    return [one - other for one, other in zip(rows, fewer, strict=True)]
