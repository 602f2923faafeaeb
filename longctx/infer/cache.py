"""KV caches: the layout of cached positions over the ring, and this rank's keys and values of each layer."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from longctx.attention.layout import Layout, empty, side_by_side
from longctx.shapes import Keys, Tensor

_BLOCK = 64  # rows


@runtime_checkable
class Cache(Protocol):
    """The cache interface of a pass: call `extend` once, then `append` or `append_each` in each layer."""

    @property
    def layout(self) -> Layout:
        """Layout of all cached positions over the ring."""
        ...

    def extend(self, later: Layout) -> None:
        """Add ``later``, the positions of the next pass, to the layout; they must follow the cached ones."""
        ...

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Append ``k`` and ``v`` of this pass to ``layer``; return all its cached keys and values, [b rows hk d]."""
        ...

    def append_each(self, layer: int, k: Keys, v: Keys) -> Sequence[tuple[Tensor, Tensor]]:
        """Append as `append` does, but return one (keys, values) for each sequence instead of concatenating them."""
        ...


class KVCache:
    """Keys and values of one sequence in all layers, for the positions that this rank caches.

    ``layout`` spans the ring of ``size`` ranks, in which this rank is ``rank``, so the cache stays sharded as it grows.
    The first `append` to a layer allocates at least ``room`` rows.  An allocation that is full grows to the rows that
    `make_room` asks for, else by an eighth but at least 64 rows, so that appending a token usually copies nothing.
    """

    def __init__(self, size: int, rank: int, room: int = 0) -> None:
        self.layout = empty(size)
        self._rank, self._room = rank, room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows that this rank caches."""
        return self.layout.rows(self._rank)

    def make_room(self, rows: int) -> None:
        """Let the next growth of this rank's cache be to ``rows`` rows more than it has now."""
        self._room = self.rows + rows

    def extend(self, later: Layout) -> None:
        """Add ``later``, the positions of the next pass; then call `append` in each layer with this rank's rows."""
        self.layout = self.layout.then(later)

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Append ``k`` and ``v`` of this pass to ``layer``; return views of all its keys and values, [b rows hk d]."""
        end, begin = self.rows, self.rows - k.shape[1]
        keys, values = self._layers.get(layer, (k[:, :0], v[:, :0]))
        if layer not in self._layers or keys.shape[1] < end:
            room = max(end, self._room)
            if begin and self._room < end:
                room += max(_BLOCK, room // 8)
            keys, values = _enlarge(keys, room), _enlarge(values, room)
            self._layers[layer] = keys, values
        if begin < end:  # a rank may have none of the pass's rows
            keys[:, begin:end] = k
            values[:, begin:end] = v
        return keys[:, :end], values[:, :end]

    def append_each(self, layer: int, k: Keys, v: Keys) -> Sequence[tuple[Tensor, Tensor]]:
        """Append as `append` does; return a list of one, since the cache has one sequence."""
        return [self.append(layer, k, v)]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the cached keys and values of ``layer`` as views, [b rows hk d]."""
        keys, values = self._layers[layer]
        return keys[:, : self.rows], values[:, : self.rows]

    def rewind(self, layout: Layout) -> None:
        """Set the cache back to ``layout``, which it had earlier; rows that were appended since then are dropped."""
        self.layout = layout

    @property
    def bytes(self) -> int:
        """Bytes of the cached rows of all layers, without room for more."""
        tensors = [x[:, : self.rows] for layer in self._layers.values() for x in layer]
        return sum(x.numel() * x.element_size() for x in tensors)


class PrefixView:
    """A continuation of the cached sequence ``prefix``, for one pass: it reads the prefix and stores nothing."""

    def __init__(self, prefix: KVCache) -> None:
        self.layout = prefix.layout
        self._prefix = prefix

    def extend(self, later: Layout) -> None:
        """Append the positions of the pass, ``later``, to the view's layout; the prefix's cache is not changed."""
        self.layout = self.layout.then(later)

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the prefix followed by this pass's, [b rows hk d], as copies."""
        keys, values = self._prefix.layer(layer)
        return torch.cat([keys, k], 1), torch.cat([values, v], 1)

    def append_each(self, layer: int, k: Keys, v: Keys) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the result of `append` as a list of one, since the view has one sequence."""
        return [self.append(layer, k, v)]


class BatchCache:
    """The caches of several sequences as one cache, with a document per sequence.

    Example: sequences of 5 and 3 cached rows make a cache of 8 rows and 2 documents.  A single sequence's tensors are
    used without a copy.  ``rank`` is this rank's number in the ring.
    """

    def __init__(self, caches: Sequence[Cache], rank: int) -> None:
        self._caches, self._rank = caches, rank
        self._rows: list[slice | Tensor] = []

    @property
    def layout(self) -> Layout:
        """Layout of all sequences over the ring, with a document per sequence."""
        return side_by_side([cache.layout for cache in self._caches])

    def extend(self, later: Layout) -> None:
        """Add ``later``, the positions of the next pass, to the caches; its document i extends cache i."""
        for cache, layout in zip(self._caches, later.by_document(), strict=True):
            cache.extend(layout)
        self._rows = [_as_slice(rows) for rows in later.rows_by_document(self._rank)]

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Append each sequence's rows to its cache and return all rows, [b rows hk d], sequence by sequence."""
        keys, values = zip(*self.append_each(layer, k, v), strict=True)
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))

    def append_each(self, layer: int, k: Keys, v: Keys) -> Sequence[tuple[Tensor, Tensor]]:
        """Append each sequence's rows to its cache; return a list of each sequence's (keys, values), [b rows hk d]."""
        if len(self._caches) == 1:
            return self._caches[0].append_each(layer, k, v)
        return [
            cache.append(layer, k[:, rows], v[:, rows]) for cache, rows in zip(self._caches, self._rows, strict=True)
        ]


def _as_slice(rows: Tensor) -> slice | Tensor:
    """Return ascending ``rows`` as a slice if they are consecutive, because indexing by a slice copies nothing."""
    first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    return slice(first, end) if end - first == len(rows) else rows


def _enlarge(x: Tensor, room: int) -> Tensor:
    """Copy ``x`` [b rows hk d] into a tensor of ``room`` rows, of which the new ones are uninitialised.

    In memory, the rows of a head follow each other: a decoding kernel reads the cache head by head.
    """
    b, rows, heads, d = x.shape
    new = x.new_empty(b, heads, room, d).transpose(1, 2)
    new[:, :rows] = x
    return new
