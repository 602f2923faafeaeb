"""Low-rank adapters: small trained matrices beside linear layers whose weights stay fixed (LoRA, arXiv 2106.09685).

A layer with the weight W [out in] computes (W + alpha / rank * B A) x, where A [rank in] and B [out rank] are trained.
Tensor-parallel ranks divide an adapter as they divide the weight:

    column-parallel   every rank has A, and its rows of B
    row-parallel      every rank has its columns of A, and B; ranks sum A x, which has `rank` columns

Training on tensor-parallel ranks always uses sequence parallelism.  The gradient of a matrix that all ranks have is
then a sum over ranks, which megatron-core computes.
"""

import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from longctx.config import LoRA
from longctx.shapes import Float, Tensor

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class Adapter(nn.Module):
    """The matrices A (``down``) and B (``up``) of one linear layer; subclasses say how ranks divide them.

    ``fused`` is the number of tensors that the layer's weight stacks along its rows, such as 2 for gate and up.  ``up``
    has a matrix for each of them.  B starts at 0, so that the model is unchanged before the first step.  A is drawn
    from ``seed`` and ``name``, which must not depend on the mesh.
    """

    divided: str  # the matrix that tensor-parallel ranks divide: down or up
    dimension: int  # the dim of that matrix along which they divide it

    def __init__(self, linear: Any, lora: LoRA, fused: int, seed: int, name: str) -> None:
        super().__init__()
        assert lora.rank is not None
        rows, columns = linear.weight.shape
        options = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        whole = torch.empty(lora.rank, linear.input_size)
        bound = linear.input_size**-0.5
        whole.uniform_(-bound, bound, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
        own = linear.tp_group.rank() * columns if columns < linear.input_size else 0
        self.down = nn.Parameter(whole[:, own : own + columns].to(**options))
        self.up = nn.ParameterList(torch.zeros(rows // fused, lora.rank, **options) for _ in range(fused))
        self.scale, self.group = lora.alpha / lora.rank, linear.tp_group
        self.sequence_parallel: bool = linear.config.sequence_parallel
        assert self.sequence_parallel or self.group.size() == 1
        for matrix, parameter in self.named_parameters():
            if matrix.startswith(self.divided):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=self.dimension, stride=1)
            else:
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def delta(self) -> Float[Tensor, "out in"]:
        """The rank's shard of alpha / rank * B A, to be added to the weight, in float32 or a more precise dtype."""
        precise = torch.promote_types(self.down.dtype, torch.float32)
        return torch.cat([*self.up]).to(precise) @ self.down.to(precise) * self.scale

    def sharded_state(self, prefix: str, offsets: Any, groups: dict[str, Any]) -> dict[str, Any]:
        """Return the adapter's matrices in the form of megatron-core's sharded checkpoints.

        ``prefix`` begins their names; ``offsets`` and ``groups`` (tp_group, dp_cp_group) are megatron-core's arguments.
        """
        state = self.state_dict(prefix="", keep_vars=True)
        divided = {name: self.dimension for name in state if name.startswith(self.divided)}
        tensors: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, divided, offsets, **groups)
        return tensors


class ColumnAdapter(Adapter):
    """Adapter of a column-parallel layer: ranks divide the rows of B."""

    divided, dimension = "up", 0

    def forward(self, x: Float[Tensor, "s b in"]) -> Float[Tensor, "sequence b out"]:
        small = F.linear(x, self.down) * self.scale
        if self.sequence_parallel:
            small = mappings.gather_from_sequence_parallel_region(small, group=self.group)
        return torch.cat([F.linear(small, up) for up in self.up], -1)


class RowAdapter(Adapter):
    """Adapter of a row-parallel layer: ranks divide the columns of A."""

    divided, dimension = "down", 1

    def forward(self, x: Float[Tensor, "sequence b in"]) -> Float[Tensor, "s b out"]:
        small = F.linear(x, self.down) * self.scale
        if self.sequence_parallel:
            small = mappings.reduce_scatter_to_sequence_parallel_region(small, group=self.group)
        return F.linear(small, *self.up)


class Adaptable:
    """Mix-in that gives a megatron-core linear layer an optional ``adapter``; None until `attach_adapters` sets it.

    The layer's forward calls `with_adapter` to add the adapter's output.
    """

    adapter: Adapter | None
    tp_group: Any  # an attribute of the linear layer, like weight
    weight: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = None  # in the class it would hide the module that is set later

    def with_adapter(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output ``out`` for the input ``x``, plus the adapter's output if there is an adapter."""
        return out if self.adapter is None else out + self.adapter(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the layer's state for a checkpoint; megatron-core alone would treat the adapter as replicated."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.adapter is None:
            return state
        own, of_adapter = f"{prefix}adapter.", {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        weights = {name: value for name, value in state.items() if not name.startswith(own)}
        return weights | self.adapter.sharded_state(own, sharded_offsets, of_adapter)


def attach_adapters(model: "GPTModel", lora: LoRA, seed: int) -> None:
    """Freeze all weights of ``model`` and give an adapter to each linear layer in ``lora.targets`` of every block.

    Every rank calls this with the same ``seed``, from which the matrices A are drawn.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    halves = 1 + model.config.gated_linear_unit
    for layer in model.decoder.layers:
        for target in lora.targets:
            linear = _linear(layer, target)
            kind = ColumnAdapter if target in ("linear_qkv", "linear_fc1") else RowAdapter
            fused = halves if target == "linear_fc1" else 1
            linear.adapter = kind(linear, lora, fused, seed, f"{layer.layer_number} {target}")
    if model.pre_process:
        # A recomputed function has gradients only if one of its inputs requires a gradient.
        model.embedding.register_forward_hook(_with_gradient)


def rounded_share(model: "GPTModel") -> float:
    """Return the rounding error of a merge in the weights' dtype, relative to the adapters; 0.0 if they add nothing.

    It is the norm of round(W + delta) - (W + delta) over all adapted weights, divided by the norm of all deltas.
    """
    error, size = 0.0, 0.0
    for linear in model.modules():
        if isinstance(linear, Adaptable) and linear.adapter is not None:
            delta = linear.adapter.delta.detach()
            merged = linear.weight.detach().to(delta.dtype) + delta
            error += float((merged.to(linear.weight.dtype).to(delta.dtype) - merged).square().sum())
            size += float(delta.square().sum())
    return (error / size) ** 0.5 if size else 0.0


def merge_adapters(model: "GPTModel") -> None:
    """Add every adapter of ``model`` to its layer's weight, and remove the adapter.

    The sum is rounded to the weight's dtype.  Convert a model in bfloat16 to float32 before: `rounded_share` of a small
    adapter is large.
    """
    for linear in model.modules():
        if not isinstance(linear, Adaptable) or linear.adapter is None:
            continue
        delta = linear.adapter.delta.detach()
        linear.weight.data.copy_(linear.weight.data.to(delta.dtype) + delta)
        linear.adapter = None


def _linear(layer: Any, target: str) -> Any:
    return getattr(layer.self_attention if target in ("linear_qkv", "linear_proj") else layer.mlp, target)


def _with_gradient(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
    return out.requires_grad_() if torch.is_grad_enabled() else out
