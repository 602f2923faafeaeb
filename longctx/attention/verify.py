"""Verification of a kernel on the device that will run it, against float64 arithmetic."""

import torch

from longctx.attention.kernel import Kernel, attend_tiles, reference
from longctx.attention.partial import Partial, empty_partial
from longctx.attention.tiles import Tile
from longctx.shapes import Keys, Queries

# (rows, keys, causal): longer than one block of any kernel, and lengths that no block size divides.
_TILES = ((257, 257, True), (67, 389, False), (1, 131, False), (389, 3, False))
_HEADS = ((3, 3), (6, 2), (8, 1))  # (query heads, KV heads)
# Relative errors. A half-precision kernel may round its output once and its intermediate values once.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6} | {
    dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)
}
# The log-sum-exp is float32 or better for every input dtype: if a kernel rounded it further, each merge would add to
# the error.
_LSE_TOLERANCE = 1e-4


def refuse_inexact(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> None:
    """Verify that ``kernel`` is exact on ``device`` for ``dtype`` and heads of ``head_dim``.

    Forward, log-sum-exp and gradients are compared with float64 arithmetic on the same device: on triangular tiles, and
    on full ones that are merged from two halves; with and without shared KV heads.

    Raises ValueError, with the measured error, if the kernel is inexact.
    """
    for (sq, sk, causal), (hq, hk) in ((tile, heads) for tile in _TILES for heads in _HEADS):
        worst, lse = _errors(kernel, sq, sk, causal, hq, hk, head_dim, device, dtype)
        # Written so that NaN fails, too.
        if not (worst <= TOLERANCE[dtype] and lse <= min(_LSE_TOLERANCE, TOLERANCE[dtype])):
            raise ValueError(
                f"kernel {kernel.name} is off by {worst:.1e} ({lse:.1e} in its log-sum-exp) on {device} in {dtype} "
                f"({sq} rows, {sk} keys, {hq} heads of {head_dim} over {hk} KV heads{', causal' if causal else ''}); "
                "use context.kernel=reference"
            )


def _errors(
    kernel: Kernel,
    sq: int,
    sk: int,
    causal: bool,
    hq: int,
    hk: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the largest relative error of out, dq, dk and dv, and the relative error of lse; NaN if a value is NaN."""
    generator = torch.Generator().manual_seed(sq * sk)
    shapes = ((sq, hq), (sk, hk), (sk, hk), (sq, hq))
    q, k, v, dout = (torch.randn(1, n, h, head_dim, generator=generator).to(device, dtype) for n, h in shapes)
    part = kernel.forward(q, k, v, causal) if causal else _merged_halves(kernel, q, k, v)
    actual = (part.lse, part.out, *kernel.backward(dout, q, k, v, part.out, part.lse, causal))
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    exact = reference.forward(q, k, v, causal)
    expected = (exact.lse, exact.out, *reference.backward(dout, q, k, v, exact.out, exact.lse, causal))
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(actual, expected, strict=True)]
    return float(torch.stack(errors[1:]).max()), float(errors[0])


def _merged_halves(kernel: Kernel, q: Queries, k: Keys, v: Keys) -> Partial:
    """Return the attention of ``q`` over all keys, merged by ``kernel`` from those of two halves."""
    total, (sq, sk) = empty_partial(q), (q.shape[1], k.shape[1])
    for first, end in ((0, sk // 2), (sk // 2, sk)):
        attend_tiles(total, q, k, v, [Tile(0, sq, first, end, causal=False)], kernel)
    return total
