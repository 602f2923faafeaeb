"""The ops that the GPU kernels call, simulated on CPU: arguments bound to their real schemas, computed in float64.

They check what the CUDA code demands: dtypes, layouts, the shape of the log-sum-exp.  The CUDA code does not run.
"""

import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def _bind(op: Any, args: Any, kwargs: Any) -> SimpleNamespace:
    """Return the arguments by the names that the schema of ``op`` gives them."""
    schema = op.default._schema.arguments
    given = {**{x.name: value for x, value in zip(schema, args, strict=False)}, **kwargs}
    assert len(args) <= len(schema) and set(given) <= {x.name for x in schema}
    for x in schema:
        if x.name not in given:
            assert x.has_default_value(), x.name
            given[x.name] = x.default_value
    return SimpleNamespace(**given)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return scores [b h sq sk] in float64; query heads in order share a KV head."""
    k = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / math.sqrt(q.shape[3])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if causal else scores


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output, [b s h d] as the inputs are, and the log-sum-exp [b h s]."""
    assert all(x.dtype == q.dtype and q.dtype in _HALVES and x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-1] % 8 == 0
    scores, v = _scores(q, k, causal), v.double().repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1).float()


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> list[Tensor]:
    assert all(x.dtype == q.dtype and q.dtype in _HALVES and x.stride(-1) == 1 for x in (dout, q, k, v, out))
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()
    shared = q.shape[2] // k.shape[2]
    probability = (_scores(q, k, causal) - lse.double().unsqueeze(-1)).exp()
    wide_k, wide_v = (x.double().repeat_interleave(shared, 2) for x in (k, v))
    dout, out = dout.double(), out.double()
    dprobability = torch.einsum("bqhd,bkhd->bhqk", dout, wide_v) - (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    dscores = probability * dprobability / math.sqrt(q.shape[3])
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, wide_k)
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q.double()).unflatten(2, (-1, shared)).sum(3)
    dv = torch.einsum("bhqk,bqhd->bkhd", probability, dout).unflatten(2, (-1, shared)).sum(3)
    return [x.to(q.dtype) for x in (dq, dk, dv)]


def _flash_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    d = _bind(torch.ops.aten._flash_attention_forward, args, kwargs)
    assert d.cum_seq_q is d.cum_seq_k is None and (d.max_q, d.max_k) == (d.query.shape[1], d.key.shape[1])
    assert d.dropout_p == 0 and d.return_debug_mask is False and d.scale is None
    assert d.window_size_left is d.window_size_right is d.alibi_slopes is d.seqused_k is None
    return (*_forward(d.query, d.key, d.value, d.is_causal), None, None, None)


def _flash_backward(*args: Any, **kwargs: Any) -> list[Tensor]:
    d = _bind(torch.ops.aten._flash_attention_backward, args, kwargs)
    assert d.cum_seq_q is d.cum_seq_k is None and (d.max_q, d.max_k) == (d.query.shape[1], d.key.shape[1])
    assert d.dropout_p == 0 and d.scale is None and d.rng_state.dtype == torch.uint64 and d.rng_state.shape == (2,)
    return _backward(d.grad_out, d.query, d.key, d.value, d.out, d.logsumexp, d.is_causal)


def _heads_last(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]  # b h s d <-> b s h d


def _cudnn_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    d = _bind(torch.ops.aten._scaled_dot_product_cudnn_attention, args, kwargs)
    assert d.attn_bias is None and d.compute_log_sumexp is True and d.dropout_p == 0 and d.scale is None
    assert d.return_debug_mask is False and d.query.shape[1] == d.key.shape[1], "no grouped heads"
    out, lse = _forward(*_heads_last(d.query, d.key, d.value), d.is_causal)
    return (out.transpose(1, 2), lse.unsqueeze(-1), *[None] * 7)


def _cudnn_backward(*args: Any, **kwargs: Any) -> list[Tensor]:
    d = _bind(torch.ops.aten._scaled_dot_product_cudnn_attention_backward, args, kwargs)
    assert d.attn_bias is d.cum_seq_q is d.cum_seq_k is None and d.dropout_p == 0 and d.scale is None
    assert (d.max_q, d.max_k) == (d.query.shape[2], d.key.shape[2]) and d.query.shape[1] == d.key.shape[1]
    assert d.philox_seed.dtype == d.philox_offset.dtype == torch.long and d.philox_seed.dim() == 0
    assert d.logsumexp.dim() == 4 and d.logsumexp.shape[-1] == 1
    wide = _heads_last(d.grad_out, d.query, d.key, d.value, d.out)
    return _heads_last(*_backward(*wide, d.logsumexp.squeeze(-1), d.is_causal))


# The signatures of flash_attn.flash_attn_interface, version 2.8.3.post2.
def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    _refuse_options(q, dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    assert return_softmax is False
    return (*_forward(q, k, v, causal), None, None)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    _refuse_options(q, dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    assert deterministic is True
    for to, x in zip((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, causal), strict=True):
        assert to.dtype == x.dtype and to.shape == x.shape
        to.copy_(x)


def _refuse_options(q: Tensor, dropout: float, scale: float, left: int, right: int, cap: float, slopes: None) -> None:
    assert (dropout, left, right, cap, slopes) == (0, -1, -1, 0, None) and math.isclose(scale, q.shape[-1] ** -0.5)


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "flash_cuda": (_flash_forward, _flash_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
}


@contextmanager
def simulated(kernel: str, old: str = "", new: str = "") -> Iterator[Any]:
    """Yield kernel ``kernel`` with simulated ops, from its source with ``old`` replaced by ``new``."""
    module = types.ModuleType(f"simulated_{kernel}")
    source = inspect.getsource(importlib.import_module(f"longctx.attention.{kernel}"))
    assert not old or source.count(old) == 1, f"{kernel}.py has {old!r} {source.count(old)} times"
    exec(compile(source.replace(old, new) if old else source, f"{kernel}.py", "exec"), module.__dict__)
    if kernel in OPS:
        module._forward_op, module._backward_op = OPS[kernel]
    package = types.ModuleType("flash_attn.flash_attn_interface")
    package._flash_attn_forward, package._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    with patch.dict(sys.modules, {"flash_attn": types.ModuleType("flash_attn"), package.__name__: package}):
        yield getattr(module, kernel)
