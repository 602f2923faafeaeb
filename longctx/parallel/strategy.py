"""The ring strategies by name, and differentiable attention with any of them."""

from typing import Any, Protocol, runtime_checkable

import torch

from longctx.attention.kernel import Kernel
from longctx.attention.partial import Partial, merge_, sink
from longctx.parallel.ring import Ring, Strategy, all_gather_kv, pass_kv, pass_q, ring_gradients
from longctx.parallel.ulysses import Attention
from longctx.shapes import Float, Keys, Queries, Tensor

STRATEGIES: dict[str, Strategy] = {"pass_kv": pass_kv, "pass_q": pass_q, "all_gather_kv": all_gather_kv}


@runtime_checkable  # so that tests can check signatures
class SavedForward(Protocol):
    """A stack of attention results, such as a list; activation recomputation pops them."""

    def append(self, partial: Partial, /) -> None: ...

    def pop(self) -> Partial: ...

    def __len__(self) -> int: ...


def ring_attention(
    ring: Ring,
    kernel: Kernel,
    strategy: Strategy,
    sinks: Float[Tensor, " hq"] | None = None,
    saved_forward: SavedForward | None = None,
) -> Attention:
    """Return differentiable attention (q, k, v) -> out [b sq hq d], in q's dtype, over a ring of ranks.

    All strategies share one backward, because gradients do not depend on what travelled in the forward.  ``sinks`` are
    the logits of the heads' attention sinks (see `partial.sink`); their gradient covers this rank's rows only.

    ``saved_forward`` is for activation recomputation: a forward without gradients appends its result, and the
    recomputation with gradients pops it.  The ring therefore runs once (selective checkpoint++ of
    arXiv 2406.18485).

    The returned function raises ValueError for inputs on which ``kernel`` has not been tested to be exact.
    """

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        kernel.refuse_untested(q, k, v)
        partial = saved_forward.pop() if saved_forward and torch.is_grad_enabled() else None
        if partial is None:
            partial = _forward(q, k, v, sinks, ring, kernel, strategy)
            if saved_forward is not None and not torch.is_grad_enabled():
                saved_forward.append(partial)
        out: Tensor = _RingAttention.apply(q, k, v, sinks, partial, ring, kernel)  # type: ignore[no-untyped-call]
        return out

    return attention


@torch.no_grad()
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring, kernel: Kernel, strategy: Strategy
) -> Partial:
    partial = strategy(q, k, v, ring, kernel)
    if sinks is not None:
        merge_(partial, slice(None), sink(sinks, partial))
    return partial


class _RingAttention(torch.autograd.Function):
    """Autograd node of ring attention: its forward returns a given result, and its backward is `ring_gradients`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, partial: Partial, ring: Ring, kernel: Kernel
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks, partial.out, partial.lse)
        ctx.ring, ctx.kernel = ring, kernel
        # A copy: callers may write to the output, and a recomputed layer still needs the saved result.
        return partial.out.to(q.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grads = ring_gradients(dout, q, k, v, Partial(out, lse), ctx.ring, ctx.kernel)
        dsinks = None
        if sinks is not None:
            # A sink's value is 0.  It takes the share exp(sink - lse) of a row's softmax weight and adds nothing.
            delta = (dout.to(out.dtype) * out).sum(-1)
            dsinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum((0, 1)).to(sinks.dtype)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), dsinks, None, None, None
