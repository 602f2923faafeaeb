"""Block attention: the interface of a kernel, the reference kernel, and the accumulation over tiles."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from longctx.attention.partial import Partial, accumulation_dtype, concat_rows, empty_partial, merge_
from longctx.attention.tiles import Tile
from longctx.shapes import Float, Keys, LogSumExp, Queries, Shaped, Tensor

Gradients = tuple[Queries, Keys, Keys]  # (dq, dk, dv)
_TileOfKeys = tuple[Tile, Tensor, Tensor]  # with the keys and values of its columns
# Partials of adjacent tiles are merged at once, up to this many rows: short documents have thousands of small tiles.
_MAX_MERGED_ROWS = 4096


@dataclass(frozen=True)
class Kernel:
    """An attention backend for one tile: a full rectangle, or a square lower triangle (``causal``).

    ``forward(q, k, v, causal)`` returns the tile's `Partial`.

    ``backward(dout, q, k, v, out, lse, causal)`` returns the tile's contribution to (dq, dk, dv), in the accumulation
    dtype.  ``out`` and ``lse`` are those of the softmax over *all* keys.  exp(score - lse) is then the probability in
    the whole softmax, so that tiles are independent of each other.

    `visible_tiles` guarantees that no tile is empty and that no row of a tile is fully masked, so that a kernel never
    needs a log-sum-exp of -inf.  A row has no finite score if its inputs are NaN or infinite, or if their product
    overflows.  For such a row the CPU's kernels return NaN as out and lse, because a finite result would hide the
    fault.  A GPU's kernel returns what its library returns.

    ``merge(total, rows, part)`` is `merge_`, or a faster function with the same result.

    The kernel accepts ``dtypes``, ``devices`` and head dimensions that are multiples of ``head_dim_multiple``.
    `refuse_untested` refuses all other inputs.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool], Partial]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Gradients]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    head_dim_multiple: int = 1
    merge: Callable[[Partial, slice, Partial], None] = merge_

    def refuse_untested(
        self,
        q: Shaped[Tensor, "b sq hq dq"],
        k: Shaped[Tensor, "b sk hk dk"],
        v: Shaped[Tensor, "b sv hv dv"],
    ) -> None:
        """Refuse inputs on which this kernel has not been tested to be exact.

        Raises ValueError for a dtype, device or head dimension that the kernel does not accept.  Heads of different
        dimensions are refused, and so are query heads that are not a multiple of the KV heads.
        """
        if q.dtype not in self.dtypes or q.device.type not in self.devices:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise ValueError(
                f"kernel {self.name} takes {dtypes} on {' or '.join(self.devices)}, not {q.dtype} on {q.device.type}; "
                "use context.kernel=reference, or a model.dtype and run.device that it takes"
            )
        if q.shape[3] % self.head_dim_multiple:
            raise ValueError(
                f"kernel {self.name} takes head dimensions that are multiples of {self.head_dim_multiple}, "
                f"not {q.shape[3]}; use context.kernel=reference"
            )
        if k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
            raise ValueError(
                f"{q.shape[2]} query heads of dimension {q.shape[3]}, {k.shape[2]} KV heads of dimension {k.shape[3]} "
                f"and values of shape {tuple(v.shape)} do not fit together; "
                "use one head dimension for all, and a number of query heads that is a multiple of the KV heads"
            )


def attend_over(q: Queries, k: Keys, v: Keys, tiles: Sequence[Tile], kernel: Kernel) -> Partial:
    """Return the attention of ``q`` over the keys in ``tiles``, normalised over these keys alone.

    Rows of ``q`` in no tile are those of `empty_partial`.
    """
    if len(tiles) == 1 and tiles[0].q == slice(0, q.shape[1]) and not tiles[0].mirrored:
        return kernel.forward(q, k[:, tiles[0].k], v[:, tiles[0].k], tiles[0].causal)
    total = empty_partial(q)
    attend_tiles(total, q, k, v, tiles, kernel)
    return total


def attend_over_each(
    q: Queries, keys_and_values: Sequence[tuple[Tensor, Tensor]], tiles: Sequence[Sequence[Tile]], kernel: Kernel
) -> Partial:
    """Return the attention of ``q`` over several tensors of keys and values; ``tiles[i]`` are tiles over tensor i.

    The query rows of a tile count in all of ``q``, its key rows in its tensor.  In decoding a batch, for example, each
    sequence has a cache and one row of ``q``.
    """
    if len(tiles) == 1:
        return attend_over(q, *keys_and_values[0], tiles[0], kernel)
    total = empty_partial(q)
    _attend(total, q, [(tile, *kv) for kv, own in zip(keys_and_values, tiles, strict=True) for tile in own], kernel)
    return total


def attend_tiles(total: Partial, q: Queries, k: Keys, v: Keys, tiles: Iterable[Tile], kernel: Kernel) -> None:
    """Merge the attention of ``q`` over the keys in ``tiles`` into ``total``, in place."""
    _attend(total, q, ((tile, k, v) for tile in tiles), kernel)


def _attend(total: Partial, q: Queries, tiles: Iterable[_TileOfKeys], kernel: Kernel) -> None:
    """Merge the attention of ``q`` over ``tiles``, each with its keys and values, into ``total``, in place."""
    for group in _group_adjacent(tiles):
        parts = []
        for tile, k, v in group:
            q_rows, k_rows, v_rows = _orient(tile, q[:, tile.q], k[:, tile.k], v[:, tile.k])
            part = kernel.forward(q_rows, k_rows, v_rows, tile.causal)
            parts.append(Partial(*_orient(tile, part.out, part.lse)))
        kernel.merge(total, slice(group[0][0].q0, group[-1][0].q1), concat_rows(parts))


def _group_adjacent(tiles: Iterable[_TileOfKeys]) -> Iterator[list[_TileOfKeys]]:
    """Yield groups of tiles whose query rows are adjacent, of at most ``_MAX_MERGED_ROWS`` rows or a single tile."""
    group: list[_TileOfKeys] = []
    for tile, k, v in tiles:
        if group and (tile.q0 != group[-1][0].q1 or tile.q1 - group[0][0].q0 > _MAX_MERGED_ROWS):
            yield group
            group = []
        group.append((tile, k, v))
    if group:
        yield group


def tile_gradients(
    dout: Queries, q: Queries, k: Keys, v: Keys, whole: Partial, tiles: Iterable[Tile], kernel: Kernel
) -> Gradients:
    """Return the contribution of ``tiles`` to (dq, dk, dv), in the accumulation dtype.

    ``whole`` is the attention of ``q`` over all keys of all ranks.
    """
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for tile in tiles:
        dout_t, q_t, out_t, lse_t = _orient(tile, *(x[:, tile.q] for x in (dout, q, whole.out, whole.lse)))
        k_t, v_t = _orient(tile, k[:, tile.k], v[:, tile.k])
        grads = _orient(tile, *kernel.backward(dout_t, q_t, k_t, v_t, out_t, lse_t, tile.causal))
        for total, grad, rows in zip((dq, dk, dv), grads, (tile.q, tile.k, tile.k), strict=True):
            total[:, rows] += grad
    return dq, dk, dv


def _orient(tile: Tile, *rows: Tensor) -> list[Tensor]:
    """Return ``rows``, reversed along dim 1 if ``tile`` is mirrored: then the tile is a lower triangle.

    A second call restores the order.
    """
    return [x.flip(1) if tile.mirrored else x for x in rows]


def _scores(q: Queries, k: Keys, causal: bool) -> Float[Tensor, "b hk g sq sk"]:
    """Return the scaled scores, with the g = hq / hk query heads that share a KV head in one axis."""
    b, sq, _, d = q.shape
    grouped = q.view(b, sq, k.shape[2], -1, d)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k) / math.sqrt(d)
    if causal:
        above = torch.ones(sq, k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    return scores


def _reference_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    q, k, v = (x.to(accumulation_dtype(q)) for x in (q.contiguous(), k, v))
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, math.nan)  # no row is fully masked: all its scores overflowed
    out = torch.einsum("bhgqk,bkhd->bqhgd", torch.exp(scores - lse.unsqueeze(-1)), v)
    return Partial(out.reshape(q.shape), lse.permute(0, 3, 1, 2).reshape(q.shape[:-1]))


def _reference_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    dout, q, k, v, out = (x.to(accumulation_dtype(q)).contiguous() for x in (dout, q, k, v, out))
    b, sq, _, d = q.shape
    grouped = (b, sq, k.shape[2], -1)
    rows_last = (0, 2, 3, 1)  # b sq hk g -> b hk g sq
    probability = torch.exp(_scores(q, k, causal) - lse.reshape(grouped).permute(rows_last).unsqueeze(-1))
    # Backward of the softmax: dscores = probability * (dprobability - delta).
    delta = (dout * out).sum(-1).reshape(grouped).permute(rows_last).unsqueeze(-1)
    dout = dout.view(*grouped, d)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", probability, dout)
    dscores = probability * (torch.einsum("bqhgd,bkhd->bhgqk", dout, v) - delta) / math.sqrt(d)
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k).reshape(q.shape)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q.view(*grouped, d))
    return dq, dk, dv


reference = Kernel("reference", _reference_forward, _reference_backward)
