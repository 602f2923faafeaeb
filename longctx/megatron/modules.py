"""Modules of decoder blocks that megatron-core lacks, or has for GPUs only: norms, and projections with an extra."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from longctx.megatron.sharded import OutputProjection, UpProjection, WeightShare
from longctx.shapes import Float, Tensor

# Arguments of megatron-core's sharded_state_dict.
Offsets = tuple[Any, ...]
Metadata = dict[str, Any] | None


class RMSNorm(nn.RMSNorm):
    """RMSNorm with megatron-core's signature; megatron-core's own wrapper rejects sequence parallelism.

    The factor is ``weight``, or 1 + ``weight`` where zero-centered.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        # By this attribute megatron-core's finalize_model_grads finds the gradients to sum over tensor-parallel ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Return ``x`` divided by its root mean square, times ``weight``, or times 1 + ``weight`` if zero-centered.

        1 + weight is not rounded to a dtype below float32.
        """
        if not self.zero_centered:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.normalized_shape, 1 + self.weight.to(precise), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, with bias, with megatron-core's signature."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010


class RMSNormOverHeads(nn.Module):
    """RMSNorm of queries or keys [s b heads d] over all heads of all tensor-parallel ranks together.

    ``hidden_size`` is the size of one head; ``heads`` counts those of all ranks.  Each rank has the weights of its
    heads.  Ranks exchange one sum of squares per row.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, tp: Any) -> None:
        super().__init__()
        self.eps, self.width, self._tp = eps, heads * hidden_size, tp
        self.weight = nn.Parameter(torch.ones(heads * hidden_size // tp.size(), dtype=config.params_dtype))
        setattr(self.weight, "tensor_model_parallel", True)  # noqa: B010
        setattr(self.weight, "partition_dim", 0)  # noqa: B010

    def forward(self, x: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h d"]:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = precise.square().sum((-1, -2), keepdim=True)
        if self._tp.size() > 1:
            squares = _SumOverRanks.apply(squares, self._tp)  # type: ignore[no-untyped-call]
        normalised: Tensor = (precise * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
        return normalised * self.weight.view(x.shape[-2:])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Metadata = None) -> Any:
        return describe_shard("weight", self.weight, self._tp, prefix, sharded_offsets, metadata)


def describe_shard(
    name: str, parameter: Tensor, tp: Any, prefix: str, sharded_offsets: Offsets, metadata: Metadata
) -> Any:
    """Return ``parameter`` in the form of megatron-core's sharded checkpoints; ranks of ``tp`` divide its dim 0.

    The result is a dict with the one key ``prefix`` + ``name``.  ``sharded_offsets`` and ``metadata`` are arguments of
    megatron-core's ``sharded_state_dict``.
    """
    replicas = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    return make_sharded_tensors_for_checkpoint(
        {name: parameter}, prefix, {name: 0}, sharded_offsets, tp_group=tp, dp_cp_group=replicas
    )


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks.  Every rank uses the sum, so its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class FeedForward(MLP):
    """megatron-core's MLP with faster gating: the time between its two projections is more than halved.

    It leaves out megatron-core's addition of 0 before gating, and gates in place if there are no gradients.  Like
    `MLP`, it returns a bias that the caller must add, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("pg_collection", "is_mtp_layer"):  # megatron-core 0.19 passes them to all MLPs
            kwargs.pop(name, None)
        super().__init__(*args, **kwargs)
        assert self.config.activation_func_clamp_value is None, "only experts have a limit"

    def forward(self, x: Float[Tensor, "s b hidden"], **_: Any) -> tuple[Tensor, Tensor | None]:
        out: tuple[Tensor, Tensor | None]
        if not self.config.gated_linear_unit:
            out = super().forward(x)
            return out
        both, bias = self.linear_fc1(x)
        gate, up = (both if bias is None else both + bias).chunk(2, -1)
        gated = self.config.activation_func(gate)
        gated = gated * up if torch.is_grad_enabled() else gated.mul_(up)
        out = self.linear_fc2(gated)
        return out


class TiledMLP(FeedForward):
    """An MLP that computes ``rows`` rows at a time, and computes them again in the backward.

    The activations of only ``rows`` rows exist at a time (Arctic Long Sequence Training, arXiv 2506.13996).
    """

    def __init__(self, *args: Any, rows: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = rows

    def forward(self, x: Float[Tensor, "s b hidden"], **_: Any) -> tuple[Float[Tensor, "s b hidden"], Tensor | None]:
        # The backward computes a tile with the share of the forward (see `SPDTransformerLayer._forward_all_shares`).
        compute = partial(self._without_bias, getattr(self.linear_fc1, "share", None))
        tiles = [tensor_parallel.checkpoint(compute, False, tile) for tile in x.split(self.rows)]
        bias = self.linear_fc2.bias  # None unless the caller must add it
        return torch.cat(tiles), None if bias is None else bias + 0  # see BiasedOutput

    def _without_bias(self, share: WeightShare | None, tile: Tensor) -> Tensor:
        """Return the output of the rows ``tile`` by ``share`` of the weights (None: all), without the caller's bias."""
        linears = (self.linear_fc1, self.linear_fc2) if share else ()
        before = [linear.share for linear in linears]
        for linear in linears:
            linear.share = share
        out: Tensor = super().forward(tile)[0]
        for linear, own in zip(linears, before, strict=True):
            linear.share = own
        return out


class BiasedOutput(nn.Module):
    """Mix-in that gives a row-parallel projection a bias, even if megatron-core's configuration turns biases off."""

    tp_group: Any  # the projection's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": True})

    def forward(self, x: Float[Tensor, "*rows n"]) -> tuple[Float[Tensor, "*out hidden"], Float[Tensor, " hidden"]]:
        out, bias = super().forward(x)
        assert bias is not None
        # megatron-core adds the bias later.  Under selective recomputation, returning the parameter itself would make
        # it an output of the recomputed function, and the backward would recurse forever.  Return a new tensor.
        return out, bias + 0


class BiasedInput(nn.Module):
    """Mix-in that gives a column-parallel projection a bias, even if megatron-core's configuration turns biases off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": True})


class NormedOutput(nn.Module):
    """Mix-in that normalises a row-parallel projection's output, summed over ranks, before the residual connection.

    While the block drops its first reduction, the projection returns this rank's partial output without the norm.  The
    block then applies ``norm`` itself (see `spd.layer`).
    """

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Float[Tensor, "*rows n"]) -> tuple[Float[Tensor, "*out hidden"], None]:
        out, bias = super().forward(x)
        assert bias is None, "no known model has a bias and a norm on one output"
        return out if self.explicit_expert_comm else self.norm(out), None


class ScaledOutput(nn.Module):
    """Mix-in that multiplies a row-parallel projection's output by ``scale`` before the residual connection."""

    def __init__(self, *args: Any, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*rows n"]) -> tuple[Float[Tensor, "*out hidden"], Tensor | None]:
        out, bias = super().forward(x)
        return out * self.scale, None if bias is None else bias * self.scale


class BiasedRowParallelLinear(BiasedOutput, OutputProjection):
    """Row-parallel projection that has a bias even if megatron-core's configuration turns biases off."""


class BiasedColumnParallelLinear(BiasedInput, UpProjection):
    """Column-parallel projection that has a bias even if megatron-core's configuration turns biases off."""


class NormedRowParallelLinear(NormedOutput, OutputProjection):
    """Row-parallel projection whose output is normalised before the residual connection."""


class ScaledRowParallelLinear(ScaledOutput, OutputProjection):
    """Row-parallel projection whose output is multiplied by ``scale`` before the residual connection."""
