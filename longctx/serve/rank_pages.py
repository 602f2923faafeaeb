"""A rank's pages in memory and, optionally, on disk, where the next server finds them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

from longctx.attention.layout import Layout
from longctx.infer.continuous import ContinuousSession
from longctx.infer.page_files import PageFiles, SavedPage
from longctx.infer.pages import PageStore
from longctx.infer.turn import Conversation
from longctx.parallel.comm import Comm, gather_bytes
from longctx.serve.prefix_cache import ROOT, NewPage, StoredPage, fitting


@dataclass(frozen=True)
class Restored:
    """The ``pages`` that were loaded from disk.

    ``lost`` is the number of pages that are damaged or missing on a rank, and ``beyond`` that of usable pages that do
    not fit into memory (``cache.gb``).
    """

    pages: list[StoredPage] = field(default_factory=list)
    lost: int = 0
    beyond: int = 0

    def __str__(self) -> str:
        lost = (
            f"; {self.lost:,} more are damaged, or missing on a rank, and will be computed again" if self.lost else ""
        )
        beyond = f"; {self.beyond:,} more do not fit into cache.gb and were deleted" if self.beyond else ""
        return f"{len(self.pages):,} pages are on disk{lost}{beyond}"


class RankPages(PageStore):
    """A `PageStore` whose `copy_from` also saves the page in ``files`` (None: in memory only)."""

    def __init__(self, session: ContinuousSession, files: PageFiles | None = None) -> None:
        ring = session.engine.ring
        super().__init__(ring.rank, session.engine.shape.layers, ring.size)
        self._device, self._files = session.engine.device, files
        self._names = {ROOT: ""}  # by number

    def copy_from(self, sequence: Conversation, new: NewPage) -> None:
        """Copy the page ``new`` from the cache of ``sequence``, and save it if there are ``files``."""
        self.store(new.number, sequence.cache, new.begin, new.end)
        if self._files:
            tokens = sequence.tokens[new.begin : new.end]
            name = self._files.write(self._names[new.before], tokens, self.page(new.number))
            self._names[new.number] = name

    def drop(self, page: int) -> None:
        """Free the page with the number ``page``, and delete its file."""
        super().drop(page)
        if self._files:
            self._files.delete([self._names.pop(page)])

    def restore(self, world: Comm, limit: int = 0) -> Restored:
        """Load the usable pages on disk into memory, and return them; all ranks of ``world`` must call this.

        Pages are numbered from 0, the same on all ranks, each after the page before it.  A page is usable if every rank
        has it, in the same layout, and all pages before it.  Pages are loaded until a rank has ``limit`` rows; the
        first rank's limit counts.  The files of other pages are deleted.
        """
        if not self._files:
            return Restored()
        # 1. The names of usable pages, without their rows.
        saved = self._files.read()
        layouts = {name: one.layout if one else None for name, one in saved.items()}
        of_ranks = [pickle.loads(data) for data in gather_bytes(world, pickle.dumps((layouts, limit)), self._device)]
        limit, of_ranks = of_ranks[0][1], [layouts for layouts, _ in of_ranks]
        names = _usable(saved, of_ranks)
        # 2. Those that fit, numbered again.
        chosen = fitting(_numbered(saved, names), limit, len(self.rows_per_rank))
        pages = _numbered(saved, [names[number] for number in chosen])
        # 3. Their rows.
        for one, number in zip(pages, chosen, strict=True):
            self.insert(one.number, self._files.load(names[number], self._device))
            self._names[one.number] = names[number]
        self._files.delete(saved.keys() - set(self._names.values()))
        lost = len({name for layouts in of_ranks for name in layouts}) - len(names)
        return Restored(pages, lost, len(names) - len(pages))


def _numbered(saved: dict[str, SavedPage | None], names: list[str]) -> list[StoredPage]:
    """Return the pages ``names`` of ``saved`` in this order, numbered from 0; each comes after the page before it."""
    numbers, pages = {"": ROOT} | {name: number for number, name in enumerate(names)}, []
    for name in names:
        one = saved[name]
        assert one, "usable"
        rows = tuple(one.layout.rows(rank) for rank in range(one.layout.size))
        pages.append(StoredPage(numbers[name], numbers[one.before], one.tokens, rows))
    return pages


def _usable(saved: dict[str, SavedPage | None], of_ranks: list[dict[str, Layout | None]]) -> list[str]:
    """Return the names of usable pages, each after the page before it; ``of_ranks`` are the layouts on each rank."""
    common = {
        name: layout
        for name, layout in of_ranks[0].items()
        if layout and all(other.get(name) == layout for other in of_ranks)
    }
    usable = {"": None}
    for name in sorted(common, key=lambda name: (common[name].begins[0], name)):
        one = saved[name]
        assert one, "every rank has it"
        if one.before in usable:
            usable[name] = None
    return [*usable][1:]
