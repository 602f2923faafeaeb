"""Specs of megatron-core's decoder blocks: the modules of a block, with the features of a `ModelShape`."""

from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from longctx.megatron.attention import ContextParallelAttention
from longctx.megatron.experts import mixture_spec
from longctx.megatron.modules import (
    BiasedColumnParallelLinear,
    BiasedRowParallelLinear,
    FeedForward,
    LayerNorm,
    NormedRowParallelLinear,
    RMSNorm,
    RMSNormOverHeads,
    ScaledRowParallelLinear,
    TiledMLP,
)
from longctx.megatron.sharded import OutputProjection, QKVProjection, UpProjection
from longctx.model_shape import Experts, ModelShape

# The dim of the weight [outputs inputs] that tensor-parallel ranks divide.
_SHARDED_DIMENSION = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}


@dataclass(frozen=True)
class Linears:
    """Classes of a block's linear layers.

    ``qkv`` reads the input of attention, ``up`` that of the MLP; with ``fused_norms``, they also apply the norms in
    front of them.  The output layers project to the residual stream.
    """

    qkv: type
    up: type
    biased_up: type
    output: type
    biased_output: type
    normed_output: type
    scaled_output: type
    fused_norms: bool = False


LOCAL = Linears(
    QKVProjection,
    UpProjection,
    BiasedColumnParallelLinear,
    OutputProjection,
    BiasedRowParallelLinear,
    NormedRowParallelLinear,
    ScaledRowParallelLinear,
)


def te_linears(shape: ModelShape) -> Linears:
    """Return Transformer Engine's linear layers for ``shape``; Transformer Engine must be installed."""
    from longctx.megatron import te_modules as te

    fused = shape.norms != "post"
    up, biased_up = (
        (te.TENormColumnLinear, te.TEBiasedNormColumnLinear) if fused else (te.TEColumnLinear, te.TEBiasedColumnLinear)
    )
    outputs = (te.TERowLinear, te.TEBiasedRowLinear, te.TENormedRowLinear, te.TEScaledRowLinear)
    return Linears(up, up, biased_up, *outputs, fused_norms=fused)


# Names of fused norms in checkpoints: those of the separate norms, so that either kind of layers loads a checkpoint.
_NAMES_IN_CHECKPOINTS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def layer_spec(
    layer_class: type[TransformerLayer],
    shape: ModelShape,
    groups: ProcessGroupCollection,
    experts: Experts | None = None,
    mlp_rows: int | None = None,
    linears: Linears = LOCAL,
) -> ModuleSpec:
    """Return the spec of a decoder block of ``layer_class``; with `LOCAL` linear layers it runs on CPU and GPU.

    With ``experts``, the mixture of ``shape`` replaces the feed-forward network, and ``mlp_rows`` has no effect.
    Otherwise, with ``mlp_rows``, this network is a `TiledMLP` that computes that many rows at a time.
    """
    norm_before = IdentityOp if shape.norms == "post" or linears.fused_norms else norm_of(shape)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.qkv,
            core_attention=ModuleSpec(module=ContextParallelAttention, params={"sinks": shape.sinks}),
            linear_proj=_output_projection(shape, shape.out_bias, linears),
            q_layernorm=_qk_norm(shape, shape.heads, groups),
            k_layernorm=_qk_norm(shape, shape.kv_heads, groups),
        ),
    )
    return ModuleSpec(
        module=layer_class,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm_before,
            mlp=mixture_spec(shape, groups) if experts else _mlp(shape, groups, mlp_rows, linears),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_NAMES_IN_CHECKPOINTS if linears.fused_norms else {},
        ),
    )


def _mlp(shape: ModelShape, groups: ProcessGroupCollection, rows: int | None, linears: Linears) -> ModuleSpec:
    """Return the spec of a feed-forward network, which computes ``rows`` rows at a time (None: all rows at once)."""
    return ModuleSpec(
        module=FeedForward if rows is None else TiledMLP,
        # megatron-core passes the group that shares the weights to its own classes only.
        params={"tp_group": groups.tp} | ({} if rows is None else {"rows": rows}),
        submodules=MLPSubmodules(
            linear_fc1=linears.biased_up if shape.mlp_bias else linears.up,
            linear_fc2=_output_projection(shape, shape.mlp_bias, linears),
        ),
    )


def norm_of(shape: ModelShape) -> type:
    """Return the class of the norms in a model of ``shape``: `LayerNorm` or `RMSNorm`."""
    return LayerNorm if shape.layer_norm else RMSNorm


def _qk_norm(shape: ModelShape, heads: int, groups: ProcessGroupCollection) -> ModuleSpec | type:
    """Return the norm of queries or keys with ``heads`` heads: per head, over all heads, or an identity."""
    if shape.qk_norm == "width":
        return ModuleSpec(module=RMSNormOverHeads, params={"heads": heads, "tp": groups.tp})
    return RMSNorm if shape.qk_norm == "head" else IdentityOp


def _output_projection(shape: ModelShape, bias: bool, linears: Linears) -> ModuleSpec | type:
    """Return the projection to the residual stream, with the norm, scale or bias of ``shape``."""
    if shape.norms != "pre":
        assert not bias and shape.residual_scale == 1, "no known model has a norm and these on one output"
        return linears.normed_output
    if shape.residual_scale != 1:
        assert not bias, "no known model has a bias and a scale on one output"
        return ModuleSpec(module=linears.scaled_output, params={"scale": shape.residual_scale})
    return linears.biased_output if bias else linears.output


def record_sharding(module: nn.Module) -> None:
    """Mark every sharded weight in ``module`` with its sharded dim, in megatron-core's attributes.

    megatron-core 0.16 does so only for weights that it initialises itself.  Call this on every module that is built
    from a `layer_spec`.
    """
    for linear in module.modules():
        dim = next((dim for kind, dim in _SHARDED_DIMENSION.items() if isinstance(linear, kind)), None)
        if dim is not None and linear.weight is not None and not hasattr(linear.weight, "partition_dim"):
            set_tensor_model_parallel_attributes(linear.weight, is_parallel=True, dim=dim, stride=1)
