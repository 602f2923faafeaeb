"""Kernel ``flash_cpu``: flash attention as shipped with torch for CPUs, by the ops that expose the log-sum-exp."""

import math

import torch

from longctx.attention import flash_onednn
from longctx.attention.kernel import Gradients, Kernel
from longctx.attention.partial import Partial, accumulation_dtype, merge_all
from longctx.shapes import Keys, LogSumExp, Queries, Tensor

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# For fewer query rows than this, the query heads that share a KV head are stacked as rows of one head.  Keys are then
# read once per KV head instead of once per query head: twice as fast for one row, equally fast at 32.
_FOLD_BELOW = 32
# For few query rows, keys are taken in blocks of this many rows.
# In float32, for 3 rows and fewer, the op sums over all keys one after the other: the error would grow with them.
# In half precision, keys are converted to float32.  A copy of all keys would not fit the processor's caches, and the
# system would zero its pages at every call.  The rows are therefore counted over all sequences.
_BLOCK_ROWS = 4096
_SUMMED_IN_TURN = 3


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # b s h d <-> b h s d, as a view


def _as_op_input(x: Tensor) -> Tensor:
    """Return ``x`` as [b h s d] with a last-axis stride of 1, which the op assumes without a check."""
    return _heads_first(x if x.stride(-1) == 1 else x.contiguous())


def _flash_forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    # The op ends the process with SIGFPE on empty inputs.
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    # Compute half precision in float32: without AMX the forward is as fast.  In bf16 the op rounds each tile's output,
    # so the error grows with the number of ranks (tests/parallel/test_drift.py).  It also sums gradients in bf16.
    if blocks := _blocks(q, k, v, causal):
        return merge_all([_flash_forward(q.to(accumulation_dtype(q)), *block, causal) for block in blocks])
    q, k, v = (x.to(accumulation_dtype(q)) for x in (q, k, v))
    if flash_onednn.suits(q, k, causal):
        return flash_onednn.forward(q, k, v, causal)
    q, k, v = (_as_op_input(x) for x in (q, k, v))
    b, hq, sq, d = q.shape
    hk = k.shape[1]
    if not causal and hq != hk and sq < _FOLD_BELOW:
        out, lse = _forward_op(q.reshape(b, hk, -1, d), k, v)
        out, lse = out.reshape(b, hq, sq, d), lse.reshape(b, hq, sq)
    else:
        out, lse = _forward_op(q, k, v, 0.0, causal)
    _mark_lost_rows(q, k, out, lse)
    return Partial(_heads_first(out), lse.transpose(1, 2))


def _blocks(q: Queries, k: Keys, v: Keys, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values in blocks if there are few queries and several blocks; otherwise nothing."""
    if q.dtype == accumulation_dtype(q):
        block, few = _BLOCK_ROWS, q.dtype == torch.float32 and q.shape[1] <= _SUMMED_IN_TURN
    else:
        block, few = max(1, _BLOCK_ROWS // q.shape[0]), q.shape[1] < _FOLD_BELOW
    if causal or not few or k.shape[1] <= block:
        return []
    return list(zip(k.split(block, 1), v.split(block, 1), strict=True))


def _mark_lost_rows(q: Tensor, k: Tensor, out: Tensor, lse: Tensor) -> None:
    """Set ``out`` and ``lse`` to NaN in rows without a finite score, for which the op returns zeros.

    The op does so for NaN scores if there are fewer than 16 keys, and for rows whose scores are all -inf.  Every row of
    a tile sees the first key, so that key's score tells such rows from true zeros.
    """
    if lse.all():  # the usual case: no log-sum-exp is 0
        return
    zeros = lse == 0
    first_key = k[:, :, :1].repeat_interleave(q.shape[1] // k.shape[1], 1)
    lost = zeros & (out == 0).all(-1) & ~(q * first_key).sum(-1).isfinite()
    lse.masked_fill_(lost, math.nan)
    out.masked_fill_(lost.unsqueeze(-1), math.nan)


def _flash_backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> Gradients:
    assert q.shape[1] and k.shape[1], "an empty tile reached the kernel"
    dtype = accumulation_dtype(q)
    if blocks := _blocks(q, k, v, causal):
        parts = [_flash_backward(dout, q.to(dtype), *block, out, lse, causal) for block in blocks]
        dq, dk, dv = zip(*parts, strict=True)
        return torch.stack(dq).sum(0), torch.cat(dk, 1), torch.cat(dv, 1)
    dout, q, k, v, out = (x.to(dtype) for x in (dout, q, k, v, out))
    if flash_onednn.suits(q, k, causal):
        return flash_onednn.backward(dout, q, k, v, out, lse, causal)
    dout, q, k, v, out = (_as_op_input(x) for x in (dout, q, k, v, out))
    dq, dk, dv = _backward_op(dout, q, k, v, out, lse.transpose(1, 2), 0.0, causal)
    return _heads_first(dq), _heads_first(dk), _heads_first(dv)


flash_cpu = Kernel("flash_cpu", _flash_forward, _flash_backward, devices=("cpu",))
