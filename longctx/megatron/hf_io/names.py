"""The table of Hugging Face tensors in a megatron-core model's parameters; loading and saving both read it.

Hugging Face names are the canonical ones of `longctx.models.family`; a family's files may have others.

| megatron-core                    | Hugging Face                        | layout in the parameter              |
|----------------------------------|-------------------------------------|--------------------------------------|
| embedding.word_embeddings.weight | model.embed_tokens.weight           | rows sharded, padded to equal shards |
| self_attention.linear_qkv        | q_proj, k_proj, v_proj              | per KV group: queries, key, value    |
| self_attention.linear_proj       | o_proj                              | columns sharded                      |
| self_attention.{q,k}_layernorm   | q_norm, k_norm                      | replicated; over all heads: sharded  |
| self_attention.core_attention    | sinks                               | sharded                              |
| self_attention.linear_proj.norm  | attention_output_layernorm          | replicated                           |
| mlp.linear_fc1                   | gate_proj, up_proj                  | per rank: gate rows, up rows         |
| mlp.linear_fc2                   | down_proj                           | columns sharded                      |
| mlp.linear_fc2.norm              | mlp_output_layernorm                | replicated                           |
| mlp.router                       | mlp.router                          | replicated                           |
| mlp.experts.local_experts.I      | mlp.experts.(first of rank + I)     | as mlp, for that expert              |
| input_layernorm                  | input_layernorm                     | replicated; TE: linear_qkv.layer_norm|
| pre_mlp_layernorm                | post_attention_layernorm            | replicated; TE: linear_fc1.layer_norm|
| decoder.final_layernorm          | model.norm                          | replicated                           |
| output_layer                     | lm_head (absent when tied)          | like the embedding                   |

A bias has the layout of its weight's rows.  Without a gate, linear_fc1 has up_proj alone.

TE marks where Transformer Engine's layers hold the norm.  With tied embeddings and several pipeline stages, the last
stage has an output_layer that is a second copy of the embedding.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from longctx.model_shape import ModelShape
from longctx.models.tensors import EMBEDDING, HEAD
from longctx.shapes import Float, Tensor

_MODEL_NAMES = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": HEAD,
}
_LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "input_layernorm.bias": ("input_layernorm.bias",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.layer_norm_bias": ("input_layernorm.bias",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.core_attention.sinks": ("self_attn.sinks",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.linear_proj.bias": ("self_attn.o_proj.bias",),
    "self_attention.linear_proj.norm.weight": ("attention_output_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.bias": ("post_attention_layernorm.bias",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_bias": ("post_attention_layernorm.bias",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc1.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "mlp.linear_fc2.bias": ("mlp.down_proj.bias",),
    "mlp.linear_fc2.norm.weight": ("mlp_output_layernorm.weight",),
    "mlp.router.weight": ("mlp.router.weight",),
    "mlp.router.bias": ("mlp.router.bias",),
}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class TensorView:
    """This rank's share of the Hugging Face tensor ``name``, as a view into a parameter.

    ``view`` is [groups rows ...]: a parameter that fuses several tensors holds their rows in turn, one group after the
    other (see `fused_views`).  ``shard_dim`` is the dim of the tensor that tensor-parallel ranks shard, or None if
    every rank holds the whole tensor.  ``full_shape`` is the shape of the whole tensor without padding.  ``ep_rank`` is
    set in saving only: the expert-parallel rank that has the tensor, or None if all have it.
    """

    name: str
    view: Tensor
    shard_dim: int | None
    full_shape: tuple[int, ...]
    ep_rank: int | None = None


def tensor_views(model: GPTModel, shape: ModelShape, ep_rank: int | None = None) -> Iterator[TensorView]:
    """Yield a view of every Hugging Face tensor that this rank holds a share of.

    Tensor names count layers over all pipeline stages, and experts over all expert-parallel ranks.  With ``ep_rank``,
    the views stay those of this rank's experts, but get the names of that rank's experts.
    """
    tp, ep = model.pg_collection.tp.size(), model.pg_collection.ep
    per_rank = shape.mixture.count // ep.size() if shape.mixture else 0
    first_expert = per_rank * (ep.rank() if ep_rank is None else ep_rank)
    for name, parameter in model.named_parameters():
        hf_names = _hf_names(model, name, shape, first_expert)
        is_padded = name.startswith(("embedding", "output_layer"))
        yield from _views_of(parameter, hf_names, shape, tp, shape.vocab_size if is_padded else None)


def tensor_views_of_layer(layer: TransformerLayer, shape: ModelShape) -> Iterator[TensorView]:
    """Yield a view of every Hugging Face tensor of one decoder layer that this rank holds a share of."""
    for name, parameter in layer.named_parameters():
        hf_names = _names_in_layer(layer.layer_number - 1, name, shape)
        yield from _views_of(parameter, hf_names, shape, layer.tp_group.size())


def _views_of(
    parameter: Any, hf_names: Sequence[str], shape: ModelShape, tp: int, full_rows: int | None = None
) -> Iterator[TensorView]:
    """Yield the views of one parameter, which has megatron-core's sharding attributes.

    ``full_rows`` is the unpadded row count of a tensor with padded shards.
    """
    shard_dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    for hf_name, view in zip(hf_names, fused_views(parameter, len(hf_names), shape, tp), strict=True):
        full_shape = [view.shape[0] * view.shape[1], *view.shape[2:]]
        if shard_dim is not None:
            full_shape[shard_dim] *= tp
            full_shape[0] = full_rows or full_shape[0]
        yield TensorView(hf_name, view, shard_dim, tuple(full_shape))


def fused_views(
    parameter: Float[Tensor, "rows ..."], tensors: int, shape: ModelShape, tp: int
) -> Sequence[Float[Tensor, "groups _ ..."]]:
    """Return views [groups rows ...] of the ``tensors`` Hugging Face tensors that this rank's ``parameter`` fuses.

    Three tensors are q, k and v: a group is a KV group, with rows of all three.  With two tensors (gate and up), or
    one, there is one group.
    """
    groups = shape.kv_heads // tp if tensors == 3 else 1
    shares = (shape.heads // shape.kv_heads, 1, 1) if tensors == 3 else (1,) * tensors
    grouped = parameter.unflatten(0, (groups, -1))
    rows = grouped.shape[1] // sum(shares)
    views: Sequence[Tensor] = grouped.split([rows * share for share in shares], 1)
    return views


def _hf_names(model: GPTModel, name: str, shape: ModelShape, first_expert: int) -> tuple[str, ...]:
    """Return the Hugging Face names of the tensors in the parameter that megatron-core calls ``name``.

    ``first_expert`` is the index of this rank's first expert among those of all ranks.
    """
    if name in _MODEL_NAMES:
        return (EMBEDDING if shape.tied and name == "output_layer.weight" else _MODEL_NAMES[name],)
    _, _, index_in_stage, name_in_layer = name.split(".", 3)
    layer = model.decoder.layers[int(index_in_stage)].layer_number - 1
    return _names_in_layer(layer, name_in_layer, shape, first_expert)


def _names_in_layer(layer: int, name: str, shape: ModelShape, first_expert: int = 0) -> tuple[str, ...]:
    """Return the Hugging Face names of the tensors in parameter ``name`` of layer ``layer``, counted from 0.

    ``first_expert`` is the index of this rank's first expert among those of all ranks.
    """
    expert = _EXPERT.match(name)
    hf_names = _LAYER_NAMES[f"mlp.{name[expert.end() :]}" if expert else name]
    if expert:
        hf_names = tuple(x.replace("mlp.", f"mlp.experts.{first_expert + int(expert[1])}.") for x in hf_names)
    return tuple(f"model.layers.{layer}.{x}" for x in hf_names if shape.gated or "gate_proj" not in x)
