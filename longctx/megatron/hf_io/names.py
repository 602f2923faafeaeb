"""Hugging Face's tensors as parts of a megatron-core model's parameters: the one table that load and save go by.

| megatron-core                    | Hugging Face                        | how                                  |
|----------------------------------|-------------------------------------|--------------------------------------|
| embedding.word_embeddings.weight | model.embed_tokens.weight           | rows sharded, padded to equal shares |
| self_attention.linear_qkv        | q_proj, k_proj, v_proj              | per group: its queries, key, value   |
| self_attention.linear_proj       | o_proj                              | columns sharded                      |
| mlp.linear_fc1                   | gate_proj, up_proj                  | per rank: its gate rows, its up rows |
| mlp.linear_fc2                   | down_proj                           | columns sharded                      |
| input_layernorm                  | input_layernorm                     | whole; TE: linear_qkv.layer_norm     |
| pre_mlp_layernorm                | post_attention_layernorm            | whole; TE: linear_fc1.layer_norm     |
| decoder.final_layernorm          | model.norm                          | whole                                |
| output_layer                     | lm_head (absent when tied)          | like the embedding                   |

Tied, only the last of several pipeline stages has an output_layer: another copy of the embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from longctx.model_shape import ModelShape
from longctx.shapes import Tensor

EMBEDDING = "model.embed_tokens.weight"
_OUTSIDE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_A_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


@dataclass(frozen=True)
class TensorView:
    """Where Hugging Face's tensor ``name`` lies in a parameter of this rank: ``view`` [groups rows ...] of it.

    ``sharded`` is the dim along which tensor-parallel ranks share the tensor (None: each has it whole), and
    ``whole`` its shape without padding.
    """

    name: str
    view: Tensor
    sharded: int | None
    whole: tuple[int, ...]


def tensor_views(model: GPTModel, shape: ModelShape) -> Iterator[TensorView]:
    """Every Hugging Face tensor of which this rank has a share; layers are counted over all pipeline stages."""
    tp = model.pg_collection.tp.size()
    for ours, parameter in model.named_parameters():
        names = _theirs(model, ours, shape)
        yield from _tensor_views(parameter, names, shape, tp, shape.vocab_size if ours in _OUTSIDE else None)


def tensor_views_of_layer(layer: TransformerLayer, shape: ModelShape) -> Iterator[TensorView]:
    """The same of one layer."""
    for ours, parameter in layer.named_parameters():
        names = tuple(f"model.layers.{layer.layer_number - 1}.{name}" for name in _OF_A_LAYER[ours])
        yield from _tensor_views(parameter, names, shape, layer.tp_group.size())


def _tensor_views(
    parameter: Any, names: Sequence[str], shape: ModelShape, tp: int, rows: int | None = None
) -> Iterator[TensorView]:
    """``rows``: of the whole, if they are padded to equal shares."""
    sharded = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    for name, view in zip(names, fused_views(parameter, len(names), shape, tp), strict=True):
        whole = [view.shape[0] * view.shape[1], *view.shape[2:]]
        if sharded is not None:
            whole[sharded] *= tp
            whole[0] = rows or whole[0]
        yield TensorView(name, view, sharded, tuple(whole))


def fused_views(parameter: Tensor, tensors: int, shape: ModelShape, tp: int) -> Sequence[Tensor]:
    """Views [groups rows ...] of the ``tensors`` that ``parameter`` holds: three are q, k and v, which alternate."""
    groups = shape.kv_heads // tp if tensors == 3 else 1
    shares = (shape.heads // shape.kv_heads, 1, 1) if tensors == 3 else (1,) * tensors
    grouped = parameter.unflatten(0, (groups, -1))
    rows = grouped.shape[1] // sum(shares)
    return grouped.split([rows * share for share in shares], 1)


def _theirs(model: GPTModel, ours: str, shape: ModelShape) -> tuple[str, ...]:
    if ours in _OUTSIDE:
        return (EMBEDDING if shape.tied and ours == "output_layer.weight" else _OUTSIDE[ours],)
    _, _, here, rest = ours.split(".", 3)
    layer = model.decoder.layers[int(here)].layer_number - 1
    return tuple(f"model.layers.{layer}.{name}" for name in _OF_A_LAYER[rest])
