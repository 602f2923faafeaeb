"""Kernel ``flash_attn``: the optional flash-attn package.  No other file imports it."""

import importlib.util

import torch

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.partial import Partial
from longctx.shapes import Keys, LogSumExp, Queries

# The compiled part of flash-attn 2: the package flash-attn-4 has a folder flash_attn, too.
installed = importlib.util.find_spec("flash_attn_2_cuda") is not None
_NO_WINDOW = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def _flash_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse, *_ = _flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal, return_softmax=False, **_NO_WINDOW
    )
    return Partial(out.float(), lse.transpose(1, 2))


def _flash_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    dout, q, k, v, out = (x.to(q.dtype).contiguous() for x in (dout, q, k, v, out))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale, lse = q.shape[-1] ** -0.5, lse.transpose(1, 2).contiguous()
    options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "deterministic": True, **_NO_WINDOW}
    _flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **options)
    return dq.float(), dk.float(), dv.float()


flash_attn = Kernel(
    "flash_attn",
    _flash_forward,
    _flash_backward,
    dtypes=(torch.bfloat16, torch.float16),
    devices=("cuda",),
    head_dim_multiple=8,
)
