"""One block of attention: what a kernel is, the plain one that all others are tested against, the fold."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from longctx.attention.partial import Partial, accumulation_dtype, concat_rows, merge_
from longctx.attention.tiles import Tile
from longctx.shapes import Keys, LogSumExp, Queries, Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
_ROWS_TOGETHER = 4096  # what tiles of fewer rows say is merged at once: short documents have thousands of them


@dataclass(frozen=True)
class Kernel:
    """A backend for one tile: a full rectangle, or (``causal``) a square lower triangle.

    ``forward(q, k, v, causal)`` gives the `Partial`; ``backward(dout, q, k, v, out, lse, causal)`` this
    tile's share of (dq, dk, dv) in the accumulation dtype, from ``out`` and ``lse`` of the *whole* softmax:
    exp(score - lse) is then already the global probability, so that no block needs another's.
    A kernel whose library marks unseen rows otherwise (+inf, 0) must say -inf.  No tile is empty, and no row of
    one is fully masked: `visible_tiles` sees to both.  ``dtypes``, ``devices`` and widths of a head that are
    multiples of ``width_step`` are what it takes; anything else is refused.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool], Partial]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Gradients]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    width_step: int = 1

    def refuse_untested(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """ValueError, naming the nearest that works, for inputs that this kernel has not been tested exact on."""
        if q.dtype not in self.dtypes or q.device.type not in self.devices:
            takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise ValueError(
                f"kernel {self.name} takes {takes} on {' or '.join(self.devices)}, not {q.dtype} on {q.device.type}: "
                "use context.kernel=reference, or model.dtype and device as it takes them"
            )
        if q.shape[3] % self.width_step:
            raise ValueError(
                f"kernel {self.name} takes heads of a multiple of {self.width_step}, not {q.shape[3]}: "
                "use context.kernel=reference"
            )
        if k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
            raise ValueError(
                f"{q.shape[2]} query heads of {q.shape[3]} over {k.shape[2]} KV heads of {k.shape[3]} and values "
                f"{tuple(v.shape)}: use heads of one width, and query heads that are a multiple of the KV heads"
            )


def attend_tiles(seen: Partial, q: Queries, k: Keys, v: Keys, tiles: Iterable[Tile], kernel: Kernel) -> None:
    """Fold what ``q`` sees of ``k`` and ``v`` into ``seen``, in place."""
    for run in _side_by_side(tiles):
        parts = []
        for tile in run:
            rows, keys, values = _facing(tile, q[:, tile.q], k[:, tile.k], v[:, tile.k])
            part = kernel.forward(rows, keys, values, tile.causal)
            parts.append(Partial(*_facing(tile, part.out, part.lse)))
        merge_(seen, slice(run[0].q0, run[-1].q1), concat_rows(parts))


def _side_by_side(tiles: Iterable[Tile]) -> Iterator[list[Tile]]:
    """Runs of tiles, each beginning at the row that the one before ends at."""
    run: list[Tile] = []
    for tile in tiles:
        if run and (tile.q0 != run[-1].q1 or tile.q1 - run[0].q0 > _ROWS_TOGETHER):
            yield run
            run = []
        run.append(tile)
    if run:
        yield run


def tile_gradients(
    dout: Queries, q: Queries, k: Keys, v: Keys, whole: Partial, tiles: Iterable[Tile], kernel: Kernel
) -> Gradients:
    """These tiles' share of (dq, dk, dv); ``whole`` is the attention over all keys of all ranks."""
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for tile in tiles:
        a, b = tile.q, tile.k
        dout_a, q_a, out_a, lse_a = _facing(tile, dout[:, a], q[:, a], whole.out[:, a], whole.lse[:, a])
        k_b, v_b = _facing(tile, k[:, b], v[:, b])
        grads = _facing(tile, *kernel.backward(dout_a, q_a, k_b, v_b, out_a, lse_a, tile.causal))
        for total, grad, rows in zip((dq, dk, dv), grads, (a, b, b), strict=True):
            total[:, rows] += grad
    return dq, dk, dv


def _facing(tile: Tile, *rows: Tensor) -> list[Tensor]:
    """``rows`` (dim 1) in the order in which ``tile`` is a lower triangle; applied twice, as they were."""
    return [x.flip(1) if tile.mirrored else x for x in rows]


def _scores(q: Queries, k: Keys, causal: bool) -> Tensor:
    """Scaled scores [b hk g sq sk]; the g = hq / hk query heads that share a KV head stand together."""
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
    delta = (dout * out).sum(-1).reshape(grouped).permute(rows_last).unsqueeze(-1)
    dout = dout.view(*grouped, d)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", probability, dout)
    dscores = probability * (torch.einsum("bqhgd,bkhd->bhgqk", dout, v) - delta) / math.sqrt(d)
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k).reshape(q.shape)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q.view(*grouped, d))
    return dq, dk, dv


reference = Kernel("reference", _reference_forward, _reference_backward)
