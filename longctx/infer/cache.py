"""A KV cache is a layout plus tensors: who holds which positions, and each layer's keys and values there."""

from longctx.attention.layout import Layout, empty
from longctx.shapes import Keys, Tensor


class KVCache:
    """Keys and values of this rank's positions, for every layer; it stays sharded as it grows.

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
        if keys.shape[1] < end:
            room = max(end, self._reserve, 2 * begin)
            keys, values = _grown(keys, room), _grown(values, room)
            self._layers[layer] = keys, values
        keys[:, begin:end] = k
        values[:, begin:end] = v
        return keys[:, :end], values[:, :end]

    @property
    def bytes(self) -> int:
        """Bytes of the positions held, over all layers; reserved room not counted."""
        held = [x[:, : self.rows] for layer in self._layers.values() for x in layer]
        return sum(x.numel() * x.element_size() for x in held)


def _grown(x: Tensor, room: int) -> Tensor:
    new = x.new_empty(x.shape[0], room, *x.shape[2:])
    new[:, : x.shape[1]] = x
    return new
