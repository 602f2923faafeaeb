"""Pages on each rank: keys and values of a few consecutive tokens, copied from one cache and later into others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.attention.layout import Layout
from longctx.infer.cache import KVCache
from longctx.shapes import Tensor


@dataclass(frozen=True)
class Page:
    """This rank's rows of a page: ``layers`` has the (keys, values) of each layer, both [1 rows hk d].

    ``layout`` has the page's positions on all ring ranks.
    """

    layout: Layout
    layers: tuple[tuple[Tensor, Tensor], ...]

    def first(self, tokens: int, rank: int) -> Page:
        """Return the page's first ``tokens`` tokens; this is ring rank ``rank``."""
        if tokens == self.layout.total:
            return self
        begin = self.layout.begins[0]
        rows = (self.layout.positions(rank) < begin + tokens).nonzero().flatten()
        rows = rows.to(self.layers[0][0].device)
        layers = tuple((keys[:, rows], values[:, rows]) for keys, values in self.layers)
        return Page(self.layout.between(begin, begin + tokens), layers)


class PageStore:
    """Pages by number, copied from caches; each rank stores the rows of a page that it has in the cache.

    ``rank`` is this rank's number in the ring of ``size`` ranks, and ``layers`` the model's number of layers.  All
    ranks must make the same calls in the same order.  ``rows_per_rank[r]`` is the number of rows that ring rank r
    stores, over all pages.
    """

    def __init__(self, rank: int, layers: int, size: int) -> None:
        self._rank, self._layers = rank, layers
        self.rows_per_rank = [0] * size
        self._pages: dict[int, Page] = {}

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values of all pages on this rank."""
        tensors = (x for page in self._pages.values() for layer in page.layers for x in layer)
        return sum(x.numel() * x.element_size() for x in tensors)

    @torch.inference_mode()
    def store(self, page: int, cache: KVCache, begin: int, end: int) -> None:
        """Copy positions ``begin`` to ``end`` (exclusive) of ``cache`` to a new page with the number ``page``."""
        positions = cache.layout.positions(self._rank)
        rows = ((positions >= begin) & (positions < end)).nonzero().flatten()
        rows = rows.to(cache.layer(0)[0].device)
        layers = []
        for layer in range(self._layers):
            keys, values = cache.layer(layer)
            layers.append((keys[:, rows], values[:, rows]))
        self.insert(page, Page(cache.layout.between(begin, end), tuple(layers)))

    @torch.inference_mode()
    def copy_to(self, cache: KVCache, pages: Sequence[tuple[int, int]]) -> None:
        """Append the first tokens of ``pages`` to ``cache``; each, at least one, is (number of the page, tokens).

        Their positions must follow the cached ones without a gap.
        """
        chosen = [self._pages[page].first(tokens, self._rank) for page, tokens in pages]
        for page in chosen:
            cache.extend(page.layout)
        for layer in range(self._layers):
            keys, values = zip(*(page.layers[layer] for page in chosen), strict=True)
            cache.append(layer, torch.cat(keys, 1), torch.cat(values, 1))

    def insert(self, page: int, content: Page) -> None:
        """Store ``content`` as page number ``page``, which must be new."""
        assert page not in self._pages, f"page {page} is stored twice"
        self._pages[page] = content
        self._count_rows(content.layout, 1)

    def page(self, number: int) -> Page:
        """Return this rank's rows of page ``number``."""
        return self._pages[number]

    def drop(self, page: int) -> None:
        """Forget page number ``page`` and free its memory."""
        self._count_rows(self._pages.pop(page).layout, -1)

    def _count_rows(self, layout: Layout, sign: int) -> None:
        for rank in range(layout.size):
            self.rows_per_rank[rank] += sign * layout.rows(rank)
