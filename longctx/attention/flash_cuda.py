"""Kernel ``flash_cuda``: torch's FlashAttention-2 for CUDA, through the ops that return the log-sum-exp too."""

import torch

from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.partial import Partial
from longctx.shapes import Keys, LogSumExp, Queries

_forward_op = torch.ops.aten._flash_attention_forward
_backward_op = torch.ops.aten._flash_attention_backward


def _flash_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    rows = (None, None, q.shape[1], k.shape[1])  # no cumulative lengths: sequences are not packed
    out, lse, *_ = _forward_op(q.contiguous(), k.contiguous(), v.contiguous(), *rows, 0.0, causal, False)
    return Partial(out.float(), lse.transpose(1, 2))  # b h s -> b s h


def _flash_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    rows = (None, None, q.shape[1], k.shape[1])
    no_dropout = (torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    dout, q, k, v, out = (x.to(q.dtype).contiguous() for x in (dout, q, k, v, out))
    lse = lse.transpose(1, 2).contiguous()
    dq, dk, dv = _backward_op(dout, q, k, v, out, lse, *rows, 0.0, causal, *no_dropout)
    return dq.float(), dk.float(), dv.float()


flash_cuda = Kernel(
    "flash_cuda",
    _flash_forward,
    _flash_backward,
    dtypes=(torch.bfloat16, torch.float16),
    devices=("cuda",),
    head_dim_multiple=8,
)
