"""A kernel shows what it can do before it is used: on this very device, against plain float64."""

import torch

from longctx.attention.kernel import Kernel, reference

# Rows, keys, whether causal; past one block of any kernel, and lengths that no block divides.
_TILES = ((257, 257, True), (67, 389, False), (1, 131, False), (389, 3, False))
_HEADS = ((3, 3), (6, 2), (8, 1))
# Of a half precision: a kernel may round what it gives, and what it works with, once each.
_ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-6} | {
    dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)
}
_ALLOWED_LSE = 1e-4  # which is float32 whatever the inputs are: rounded to less, it would grow with every merge


def refuse_inexact(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int = 64) -> None:
    """ValueError, with the error that was measured, unless ``kernel`` is exact on ``device`` for ``dtype``.

    ``width`` is of the heads.

    Forward, log-sum-exp and gradients of full and triangular tiles and of shared KV heads, against float64
    arithmetic on the same device.
    """
    for (sq, sk, causal), (hq, hk) in ((tile, heads) for tile in _TILES for heads in _HEADS):
        worst, lse = _errors(kernel, sq, sk, causal, hq, hk, width, device, dtype)
        if not (worst <= _ALLOWED[dtype] and lse <= min(_ALLOWED_LSE, _ALLOWED[dtype])):  # also if one is NaN
            raise ValueError(
                f"kernel {kernel.name} is off by {worst:.1e} ({lse:.1e} in its log-sum-exp) on {device} in {dtype} "
                f"({sq} rows, {sk} keys, {hq} heads of {width} over {hk}{', causal' if causal else ''}): "
                "use context.kernel=reference"
            )


def _errors(
    kernel: Kernel,
    sq: int,
    sk: int,
    causal: bool,
    hq: int,
    hk: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """The largest error of out, dq, dk and dv, each in its norm, and that of lse; NaN if one is NaN."""
    draw = torch.Generator().manual_seed(sq * sk)
    shapes = ((sq, hq), (sk, hk), (sk, hk), (sq, hq))
    q, k, v, dout = (torch.randn(1, n, h, width, generator=draw).to(device, dtype) for n, h in shapes)
    part = kernel.forward(q, k, v, causal)
    got = (part.lse, part.out, *kernel.backward(dout, q, k, v, part.out, part.lse, causal))
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    exact = reference.forward(q, k, v, causal)
    right = (exact.lse, exact.out, *reference.backward(dout, q, k, v, exact.out, exact.lse, causal))
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(got, right, strict=True)]
    return float(torch.stack(errors[1:]).max()), float(errors[0])
