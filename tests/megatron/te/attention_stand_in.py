"""Transformer Engine's context parallelism on CPU: attention of one pair of blocks is dense and in float64.

Transformer Engine's own Python code runs: the checks of `DotProductAttention`, the order of chunks, the messages
between ranks, the merges of partial results, and the backward.  Replaced are the two functions that compute a pair of
blocks (flash-attn's and cuDNN's), the choice between them, and CUDA's streams.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

FLASH_ATTN = "2.8.3"
BACKENDS = ("flash", "cudnn")
SENT: Counter[str] = Counter()  # numbers that this rank handed to each kind of message


class _NoStream:
    """CUDA's streams and events on a CPU, where every call has ended when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any) -> None: ...


class _WaitedOnce:
    """A message in flight that may be waited for again, as NCCL's may: gloo would wait for a second message."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = None


class _Torch(ModuleType):
    """The module torch with float64 in the place of float16, for code that takes 16 bits only."""

    float16 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> None:
    """Let `DotProductAttention` run on CPU with float64 tensors; call it after `stand_in.install`."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils

    utils.FlashAttentionUtils.version = Version(FLASH_ATTN)
    utils.FlashAttentionUtils.set_flash_attention_version()
    backends._flash_attn_fwd, backends._flash_attn_bwd = _flash_attn_forward, _flash_attn_backward
    backends.torch = _Torch("torch")
    for name, function in (("fused_attn_fwd", _cudnn_forward), ("fused_attn_bwd", _cudnn_backward)):
        setattr(context_parallel, name, _bound(getattr(context_parallel, name), function))
    context_parallel.get_device_compute_capability = lambda: (9, 0)
    _count_messages(context_parallel)
    for name in ("Stream", "Event", "current_stream"):
        setattr(torch.cuda, name, _NoStream)
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")
    _claim_cuda()


def choose(backend: str) -> None:
    """Make Transformer Engine choose ``backend``, one of `BACKENDS`, from now on."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention, utils

    chosen = (backend == "flash", Version(FLASH_ATTN), backend == "cudnn", 1, False, [True, True, False])
    utils.get_attention_backend = lambda parameters: chosen
    dot_product_attention._attention_backends["backend_selection_requires_update"] = True


def _count_messages(context_parallel: Any) -> None:
    """Count the numbers that this rank sends in `SENT`, and make messages of a ring `_WaitedOnce`."""
    send = context_parallel.flash_attn_p2p_communicate

    def p2p(rank: int, tensor: Tensor, *args: Any) -> list[_WaitedOnce]:
        SENT["p2p"] += tensor.numel()
        return [_WaitedOnce(work) for work in send(rank, tensor, *args)]

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(out: Tensor, mine: Tensor, *args: Any, **kwargs: Any) -> Any:
            SENT[name] += mine.numel()
            return original(out, mine, *args, **kwargs)

        return call

    context_parallel.flash_attn_p2p_communicate = p2p
    for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, counted(name))


def _claim_cuda() -> None:
    """Make tensors say that they are on a GPU while `DotProductAttention` checks them."""
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import DotProductAttention

    forward = DotProductAttention.forward

    def claimed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with patch.object(torch.Tensor, "is_cuda", property(lambda x: True)):
            return forward(self, *args, **kwargs)

    DotProductAttention.forward = claimed


def _bound(original: Callable[..., Any], function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return ``function`` of the arguments by the names of ``original``'s signature."""
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(SimpleNamespace(**bound.arguments))

    return call


# The signatures of flash_attn.flash_attn_interface, version 2.8.3.post2.
def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0, 0, None, False)
    seen = _seen(q, k, window_size_left, 0 if causal else window_size_right, last_rows_meet=True)
    return (*_forward(q, k, v, softmax_scale, seen), None, None)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes) == (0, 0, None)
    seen = _seen(q, k, window_size_left, 0 if causal else window_size_right, last_rows_meet=True)
    for to, x in zip((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, softmax_scale, seen), strict=True):
        assert to.dtype == x.dtype and to.shape == x.shape
        to.copy_(x)


def _cudnn_forward(d: SimpleNamespace) -> tuple[Any, ...]:
    out, lse = _forward(d.q, d.k, d.v, d.attn_scale, _cudnn_mask(d))
    return out, [lse.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]


def _cudnn_backward(d: SimpleNamespace) -> tuple[Any, ...]:
    lse = d.aux_ctx_tensors[0]
    assert lse.dim() == 4 and lse.shape[-1] == 1
    return *_backward(d.d_o, d.q, d.k, d.v, d.o, lse.squeeze(-1), d.attn_scale, _cudnn_mask(d)), None


def _cudnn_mask(d: SimpleNamespace) -> Tensor:
    """Return the mask of a call of cuDNN's attention, after a check of its lengths and of what it leaves out."""
    assert d.qkv_layout == "bshd_bshd_bshd" and d.o_format == "bshd"
    assert (d.dropout, d.attn_bias_type, d.softmax_type) == (0, "no_bias", "vanilla")
    for x, cumulative, longest in ((d.q, d.cu_seqlens_q, d.max_seqlen_q), (d.k, d.cu_seqlens_kv, d.max_seqlen_kv)):
        assert longest == x.shape[1] and cumulative.tolist() == [i * x.shape[1] for i in range(x.shape[0] + 1)]
    assert d.attn_mask_type in ("causal", "causal_bottom_right", "no_mask")
    right = 0 if "causal" in d.attn_mask_type else d.window_size[1]
    return _seen(d.q, d.k, d.window_size[0], right, last_rows_meet=d.attn_mask_type == "causal_bottom_right")


def _seen(q: Tensor, k: Tensor, left: int, right: int, last_rows_meet: bool) -> Tensor:
    """Return the bool mask [sq sk] of a band: ``left`` keys before and ``right`` after a query's own; -1 is no bound.

    With ``last_rows_meet`` the last query's own key is the last one, else the first query's own key is the first one.
    """
    sq, sk = q.shape[1], k.shape[1]
    ahead = torch.arange(sk)[None] - torch.arange(sq)[:, None] - (sk - sq if last_rows_meet else 0)
    seen = (ahead <= right if right >= 0 else torch.ones_like(ahead, dtype=torch.bool)) & (
        ahead >= -left if left >= 0 else torch.ones_like(ahead, dtype=torch.bool)
    )
    assert seen.any(-1).all(), "a query without keys"
    return seen


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~seen, -math.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [b sq hq d] and the log-sum-exp [b hq sq], which the kernels return in float32."""
    assert all(x.dtype == torch.float64 and x.stride(-1) == 1 for x in (q, k, v))
    scores, v = _scores(q, k, scale, seen), v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of one pair of blocks, from the output and log-sum-exp over all keys."""
    assert dout.shape == out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    shared = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(shared, 2) for x in (k, v))
    probability = (_scores(q, k, scale, seen) - lse.unsqueeze(-1)).exp()
    delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    dscores = probability * (torch.einsum("bqhd,bkhd->bhqk", dout, wide_v) - delta) * scale
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q).unflatten(2, (-1, shared)).sum(3)
    dv = torch.einsum("bhqk,bqhd->bkhd", probability, dout).unflatten(2, (-1, shared)).sum(3)
    return torch.einsum("bhqk,bkhd->bqhd", dscores, wide_k), dk, dv
