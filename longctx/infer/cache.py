"""A KV cache is a layout plus tensors: who holds which positions, and each layer's keys and values there."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from longctx.attention.layout import Layout, empty, side_by_side
from longctx.shapes import Keys, Tensor


@runtime_checkable
class Cache(Protocol):
    """What a pass needs of a cache: it grows by a layout, then layer by layer by the keys and values."""

    @property
    def layout(self) -> Layout: ...

    def extend(self, later: Layout) -> None: ...

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """One sequence's keys and values of this rank's positions, for every layer; it stays sharded as it grows.

    ``layout`` spans the ring.  Room for ``reserve`` rows is made at once, and doubled when it runs out, so
    that growing by a token copies nothing.
    """

    def __init__(self, size: int, rank: int, reserve: int = 0) -> None:
        self.layout = empty(size)
        self._rank, self._reserve = rank, reserve
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return self.layout.rows(self._rank)

    def extend(self, later: Layout) -> None:
        """The positions that the next pass adds; each layer's `append` then brings their keys and values."""
        self.layout = self.layout.then(later)

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Add this pass's keys and values of ``layer``; all that it holds, [b rows hk d], as views."""
        end, begin = self.rows, self.rows - k.shape[1]
        keys, values = self._layers.get(layer, (k[:, :0], v[:, :0]))
        if layer not in self._layers or keys.shape[1] < end:
            room = max(end, self._reserve, 2 * begin)
            keys, values = _grown(keys, room), _grown(values, room)
            self._layers[layer] = keys, values
        keys[:, begin:end] = k
        values[:, begin:end] = v
        return keys[:, :end], values[:, :end]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that it holds of ``layer``, [b rows hk d], as views."""
        keys, values = self._layers[layer]
        return keys[:, : self.rows], values[:, : self.rows]

    def rewind(self, layout: Layout) -> None:
        """Back to ``layout``, which it had before: what has been appended since is forgotten."""
        self.layout = layout

    @property
    def bytes(self) -> int:
        """Bytes of the positions held, over all layers; reserved room not counted."""
        held = [x[:, : self.rows] for layer in self._layers.values() for x in layer]
        return sum(x.numel() * x.element_size() for x in held)


class PrefixView:
    """A sequence that begins as ``prefix`` did, for one pass: it reads the stem's keys and values and keeps none."""

    def __init__(self, prefix: KVCache) -> None:
        self.layout = prefix.layout
        self._prefix = prefix

    def extend(self, later: Layout) -> None:
        """The positions that the pass adds."""
        self.layout = self.layout.then(later)

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """The stem's keys and values of ``layer`` and behind them this pass's, [b rows hk d]."""
        keys, values = self._prefix.layer(layer)
        return torch.cat([keys, k], 1), torch.cat([values, v], 1)


class BatchCache:
    """The caches of several sequences as one, each of them a document; one sequence's is used as it stands."""

    def __init__(self, caches: Sequence[Cache], rank: int) -> None:
        self._caches, self._rank = caches, rank
        self._rows: list[slice | Tensor] = []

    @property
    def layout(self) -> Layout:
        return side_by_side([cache.layout for cache in self._caches])

    def extend(self, later: Layout) -> None:
        """The positions that the next pass adds, ``later``'s documents being the sequences."""
        for i, cache in enumerate(self._caches):
            cache.extend(later.document(i))
        self._rows = [_as_slice(later.rows_of(self._rank, i)) for i in range(len(self._caches))]

    def append(self, layer: int, k: Keys, v: Keys) -> tuple[Tensor, Tensor]:
        """Deal this pass's rows to the sequences; all that they hold, one sequence behind the other."""
        if len(self._caches) == 1:
            return self._caches[0].append(layer, k, v)
        held = []
        for cache, rows in zip(self._caches, self._rows, strict=True):
            held.append(cache.append(layer, k[:, rows], v[:, rows]))
        keys, values = zip(*held, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)


def _as_slice(rows: Tensor) -> slice | Tensor:
    """Ascending ``rows``, if none between them is missing: what is taken by them is then not copied."""
    first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    return slice(first, end) if end - first == len(rows) else rows


def _grown(x: Tensor, room: int) -> Tensor:
    new = x.new_empty(x.shape[0], room, *x.shape[2:])
    new[:, : x.shape[1]] = x
    return new
