"""Kernel ``cudnn``: cuDNN attention as shipped with torch for CUDA, the fastest of torch's own kernels on Hopper."""

import torch

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.partial import Partial
from longctx.shapes import Keys, LogSumExp, Queries, Tensor

_forward_op = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()  # b s h d <-> b h s d


def _repeat_kv_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x``, keys or values, with each KV head once for every query head: the op has no GQA."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _cudnn_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    k, v = (_repeat_kv_heads(x, q.shape[2]) for x in (k, v))
    out, lse, *_ = _forward_op(*map(_heads_first, (q, k, v)), None, True, 0.0, causal)
    return Partial(_heads_first(out).float(), lse.reshape(out.shape[:3]).transpose(1, 2))


def _cudnn_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    b, sk, hk, d = k.shape
    k, v = (_repeat_kv_heads(x, q.shape[2]) for x in (k, v))
    dout, q, k, v, out = (_heads_first(x.to(q.dtype)) for x in (dout, q, k, v, out))
    # A copy, since cuDNN requires addresses that are multiples of 16 bytes.  With one head, `contiguous` would return a
    # view, which may begin at any row.
    lse = lse.transpose(1, 2).clone(memory_format=torch.contiguous_format).unsqueeze(-1)
    no_dropout = (torch.zeros((), dtype=torch.long, device=q.device),) * 2
    unpacked = (None, None, None, q.shape[2], sk)  # no bias, no cumulative lengths; the numbers of rows and keys
    grads = _backward_op(dout, q, k, v, out, lse, *no_dropout, *unpacked, 0.0, causal)
    dq, dk, dv = (_heads_first(x).float() for x in grads)
    # The gradient of a KV head is the sum over its copies.
    return dq, dk.view(b, sk, hk, -1, d).sum(3), dv.view(b, sk, hk, -1, d).sum(3)


cudnn = Kernel(
    "cudnn",
    _cudnn_forward,
    _cudnn_backward,
    dtypes=(torch.bfloat16, torch.float16),
    devices=("cuda",),
    head_dim_multiple=8,
)
