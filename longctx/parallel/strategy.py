"""The strategies by name, and the differentiable attention that any of them makes."""

from typing import Any

import torch

from longctx.attention.kernel import Kernel
from longctx.attention.partial import Partial
from longctx.parallel.ring import Ring, Strategy, all_gather_kv, pass_kv, pass_q, ring_gradients
from longctx.parallel.ulysses import Attention
from longctx.shapes import Keys, Queries, Tensor

STRATEGIES: dict[str, Strategy] = {"pass_kv": pass_kv, "pass_q": pass_q, "all_gather_kv": all_gather_kv}


def ring_attention(ring: Ring, kernel: Kernel, strategy: Strategy) -> Attention:
    """Differentiable attention (q, k, v) -> out [b sq hq d] in q's dtype, over a ring of ranks.

    Gradients do not care what travelled in the forward: one backward serves all strategies.
    """

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        return _RingAttention.apply(q, k, v, ring, kernel, strategy)

    return attention


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, kernel: Kernel, strategy: Strategy) -> Tensor:
        whole = strategy(q, k, v, ring, kernel)
        ctx.save_for_backward(q, k, v, whole.out, whole.lse)
        ctx.ring, ctx.kernel = ring, kernel
        return whole.out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = ring_gradients(dout, q, k, v, Partial(out, lse), ctx.ring, ctx.kernel)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None
