"""Linear layers for sharded decoding: each context rank multiplies a share of the weights (``context.decode=sharded``).

Every context rank holds all weights.  While a `WeightShare` is in use, the N context ranks act as N tensor-parallel
ranks: each one multiplies a view of its weights.  All ranks have the same rows x [s b hidden].  In a layer, with W_r
for rank r's share of a weight:

    linear_qkv    all-gather of W_r x              queries, keys and values of all heads, on every rank
    attention     all heads over the keys that this rank caches; the merge gives rank r the outputs of its heads
    linear_proj   sum over r of W_r heads_r        a sum over all ranks
    linear_fc1    W_r x                            this rank's neurons
    linear_fc2    sum over r of W_r neurons_r      a sum over all ranks

Shares may be uneven.  Every rank computes norms, rotary embedding and residual connections.  Biases and scales are
applied once, after the sum.  With tensor parallelism, context ranks share each tensor-parallel shard, and sums include
the tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP

from longctx.megatron.lora import Adaptable
from longctx.megatron.products import linear
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, SingleRankComm, doing, sum_over_ranks
from longctx.shapes import Float, Tensor


@dataclass
class WeightShare:
    """This rank's share of a model's weights; it takes effect inside `in_use` only.

    ``context`` is the group of ranks that share the weights.  ``tp_context`` is the group of these ranks and of the
    tensor-parallel ranks, over which partial outputs are summed.  The logits are multiplied by ``logit_scale``.
    """

    context: Comm
    tp_context: Comm
    logit_scale: float = 1.0
    active: bool = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the model's layers compute only this share inside the ``with`` block."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def ranges(self, n: int) -> list[range]:
        """Cut ``n`` rows or columns into near-equal ranges, one for each context rank; some may be empty."""
        size = self.context.size
        return [range(n * rank // size, n * (rank + 1) // size) for rank in range(size)]

    def own(self, n: int, unit: int = 1) -> slice:
        """Return this rank's range of ``n`` rows or columns; ranges are cut at multiples of ``unit``."""
        mine = self.ranges(n // unit)[self.context.rank]
        return slice(mine.start * unit, mine.stop * unit)

    def sum(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Return the sum of partial outputs ``x`` over all context ranks and tensor-parallel ranks."""
        with doing("summing partial outputs"):
            return sum_over_ranks(self.tp_context, x)

    def gather(self, x: Float[Tensor, "s b share"], n: int) -> Float[Tensor, "s b n"]:
        """Concatenate the context ranks' shares ``x`` of ``n`` columns, in rank order."""
        with doing("gathering shares of columns"):
            parts = self.context.all_gather(x, [(*x.shape[:-1], len(share)) for share in self.ranges(n)])
        return torch.cat(parts, -1)

    def project_vocab(
        self, hidden: Float[Tensor, "s b hidden"], weight: Float[Tensor, "vocab hidden"]
    ) -> Float[Tensor, "s b vocab"]:
        """Return the logits of all rows of ``weight``; each rank multiplies its share of the rows."""
        logits = linear(hidden, weight[self.own(len(weight))])
        return self.gather(logits if self.logit_scale == 1 else logits * self.logit_scale, len(weight))


def all_shares(ranks: int) -> tuple[WeightShare, ...]:
    """Return the share of each of ``ranks`` ranks, all in use, so that one rank can compute them one after another."""
    shares = (SingleRankComm(rank, ranks) for rank in range(ranks))
    return tuple(WeightShare(share, SingleRankComm(), active=True) for share in shares)


def share_weights(model: GPTModel, shape: ModelShape, context: Comm, tp_context: Comm) -> WeightShare:
    """Prepare ``model`` for sharded decoding over ``context``; return this rank's share, which is not yet in use.

    Mixtures of experts are not shared: every rank computes the experts of all tokens.
    """
    share = WeightShare(context, tp_context, shape.logit_scale)
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        linears = [attention.linear_qkv, attention.linear_proj]
        if isinstance(mlp, MLP):
            linears += [mlp.linear_fc1, mlp.linear_fc2]
        for each in linears:
            each.share = share
        attention.linear_proj.unit = shape.head_dim
    return share


class InputProjection(Adaptable, ColumnParallelLinear):
    """megatron-core's column-parallel projection, with less overhead where no gradients are needed."""

    share: WeightShare | None = None

    def forward(self, x: Float[Tensor, "*rows hidden"], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.sequence_parallel:
            out, bias = super().forward(x, *args, **kwargs)
        else:
            added, bias = (None, self.bias) if self.skip_bias_add else (self.bias, None)
            out = linear(x, self.weight, added)
        return self.with_adapter(out, x), bias


class QKVProjection(InputProjection):
    """Projection to queries, keys and values; with a share in use, a rank computes its columns and gathers the rest."""

    def forward(self, x: Float[Tensor, "*rows hidden"], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not (self.share and self.share.active):
            return super().forward(x, *args, **kwargs)
        rows = len(self.weight)
        own = self.share.own(rows)
        mine = linear(x, self.weight[own], None if self.bias is None else self.bias[own])
        return self.share.gather(mine, rows), None


class UpProjection(InputProjection):
    """Projection to gate and up, or to up alone; with a share in use, it computes this rank's neurons."""

    def forward(self, x: Float[Tensor, "*rows hidden"], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not (self.share and self.share.active):
            return super().forward(x, *args, **kwargs)
        halves = 1 + self.config.gated_linear_unit
        own = self.share.own(len(self.weight) // halves)
        out = torch.cat([linear(x, weight[own]) for weight in self.weight.chunk(halves)], -1)
        return out, None if self.bias is None else torch.cat([bias[own] for bias in self.bias.chunk(halves)])


class OutputProjection(Adaptable, RowParallelLinear):
    """Projection to the residual stream; with a share in use, it multiplies this rank's columns and sums over ranks.

    These are the context and the tensor-parallel ranks.  ``x`` then has this rank's columns only.  Shares are cut at
    multiples of ``unit`` columns: in attention, a head's columns.

    In a block that drops its first reduction, neither attention's nor the MLP's projection sums: each returns this
    rank's partial output, and the layer reduces both together.  With ``parts`` = n, attention's projection gets all
    columns, and computes the partial outputs of all n ranks itself, [n s b hidden].

    ``reduction`` replaces megatron-core's all-reduce over tensor-parallel ranks (see `longctx.megatron.reduce`).
    """

    share: WeightShare | None = None
    reduction: Callable[[Tensor], Tensor] | None = None
    unit = 1
    parts = 0

    def forward(self, x: Float[Tensor, "*rows columns"]) -> tuple[Float[Tensor, "*out hidden"], Tensor | None]:
        if self.share and self.share.active:
            out = linear(x, self.weight[:, self.share.own(self.weight.shape[1], self.unit)])
            return out if self.explicit_expert_comm else self.share.sum(out), self.bias
        if self.parts:
            columns = zip(x.chunk(self.parts, -1), self.weight.chunk(self.parts, 1), strict=True)
            return torch.stack([linear(part, weight) for part, weight in columns]), self.bias
        if self.reduction and not self.explicit_expert_comm:
            return self.reduction(linear(x, self.weight)), self.bias
        if torch.is_grad_enabled() or self.sequence_parallel:
            out, bias = super().forward(x)
        else:
            out, bias = linear(x, self.weight), self.bias
            if not self.explicit_expert_comm and self.tp_group.size() > 1:
                out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return self.with_adapter(out, x), bias
