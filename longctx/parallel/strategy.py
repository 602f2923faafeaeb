"""The strategies by name, and the differentiable attention that any of them makes."""

from typing import Any

import torch

from longctx.attention.kernel import Kernel
from longctx.attention.partial import Partial, merge_, sink
from longctx.parallel.ring import Ring, Strategy, all_gather_kv, pass_kv, pass_q, ring_gradients
from longctx.parallel.ulysses import Attention
from longctx.shapes import Float, Keys, Queries, Tensor

STRATEGIES: dict[str, Strategy] = {"pass_kv": pass_kv, "pass_q": pass_q, "all_gather_kv": all_gather_kv}


def ring_attention(
    ring: Ring,
    kernel: Kernel,
    strategy: Strategy,
    sinks: Float[Tensor, " hq"] | None = None,
    kept: list[Partial] | None = None,
) -> Attention:
    """Differentiable attention (q, k, v) -> out [b sq hq d] in q's dtype, over a ring of ranks.

    Gradients do not care what travelled in the forward: one backward serves all strategies.  ``sinks`` are the
    logits of the heads' attention sinks (see `partial.sink`); their gradient is that of this rank's rows.
    ``kept`` is for recomputed activations: a forward without gradients leaves its answer there, and the recompute
    with gradients takes it, so that the ring never runs twice (selective checkpoint++ of arXiv 2406.18485).
    Raises ValueError for inputs that ``kernel`` has not been tested exact on.
    """

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        kernel.refuse_untested(q, k, v)
        answer = kept.pop() if kept and torch.is_grad_enabled() else None
        if answer is None:
            answer = _answer(q, k, v, sinks, ring, kernel, strategy)
            if kept is not None and not torch.is_grad_enabled():
                kept.append(answer)
        return _RingAttention.apply(q, k, v, sinks, answer, ring, kernel)

    return attention


@torch.no_grad()
def _answer(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring, kernel: Kernel, strategy: Strategy
) -> Partial:
    whole = strategy(q, k, v, ring, kernel)
    if sinks is not None:
        merge_(whole, slice(None), sink(sinks, whole))
    return whole


class _RingAttention(torch.autograd.Function):
    """The answer as it is; the backward is the ring's."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, answer: Partial, ring: Ring, kernel: Kernel
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks, answer.out, answer.lse)
        ctx.ring, ctx.kernel = ring, kernel
        # A copy: what a checkpointed forward has kept must not be what others may write into.
        return answer.out.to(q.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grads = ring_gradients(dout, q, k, v, Partial(out, lse), ctx.ring, ctx.kernel)
        dsinks = None
        if sinks is not None:
            # A sink's value is 0: all it does to a row is to take exp(sink - lse) of its weight.
            delta = (dout.to(out.dtype) * out).sum(-1)
            dsinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum((0, 1)).to(sinks.dtype)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), dsinks, None, None, None
