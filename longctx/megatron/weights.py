"""Hugging Face weights into a megatron-core model, each tensor-parallel rank taking its part.

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
"""

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from longctx.pretrained import tensor_files
from longctx.schema import ModelShape
from longctx.shapes import Tensor

_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


class Weights:
    """The tensors of a safetensors folder, in one file or many, read by name; what was read is remembered."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, tensor_files(folder)
        self._read: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"{self._folder} has no tensor {name}, which the model's config.json promises")
        self._read.add(name)
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: use an unquantised checkpoint")
        return tensor

    def refuse_unread(self, tied: bool) -> None:
        """ValueError if a tensor was never asked for; derived ones, and a tied lm_head, may stay."""
        left = {n for n in self._files if not n.endswith("rotary_emb.inv_freq")} - self._read
        left -= {"lm_head.weight"} if tied else set()
        if left:
            raise ValueError(f"{self._folder} has tensors that no part of the model takes: {sorted(left)[:3]}")


@torch.no_grad()
def load(model: GPTModel, read: Weights, shape: ModelShape) -> None:
    """Fill every parameter of ``model`` from Hugging Face tensors.

    Raises ValueError if a tensor is missing, is quantised, has another shape than the model's, or is left over
    in the file: a model that lacks a part would run, and be wrong.
    """
    tp = model.pg_collection.tp
    for name, parameter in model.named_parameters():
        whole = _unsharded(name, read, shape)
        part = _part(name, whole, parameter, tp.size(), tp.rank())
        if part.shape != parameter.shape:
            raise ValueError(f"{name}: the file has {tuple(part.shape)}, the model {tuple(parameter.shape)}")
        parameter.copy_(part)
    read.refuse_unread(shape.tied)


def _unsharded(name: str, read: Weights, shape: ModelShape) -> Tensor:
    if name == "embedding.word_embeddings.weight":
        return read("model.embed_tokens.weight")
    if name == "output_layer.weight":
        return read("lm_head.weight")
    if name == "decoder.final_layernorm.weight":
        return read("model.norm.weight")
    _, _, layer, rest = name.split(".", 3)
    theirs = f"model.layers.{layer}."
    kind = rest.rsplit(".", 1)[-1]
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return fuse_qkv(*(read(f"{theirs}self_attn.{x}_proj.{kind}") for x in "qkv"), groups=shape.kv_heads)
    if rest == "mlp.linear_fc1.weight":
        return torch.stack([read(f"{theirs}mlp.{x}_proj.weight") for x in ("gate", "up")])
    return read(theirs + _PLAIN[rest])


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Rows of q, k, v (weights [h*d hidden] or biases [h*d]) as megatron-core orders them: group by group."""
    parts = (x.reshape(groups, x.shape[0] // groups, *x.shape[1:]) for x in (q, k, v))
    return torch.cat(list(parts), 1).flatten(0, 1)


def _part(name: str, whole: Tensor, parameter: Tensor, size: int, rank: int) -> Tensor:
    if name.endswith("linear_fc1.weight"):  # [2 ffn hidden]: gate and up are sharded each on its own
        return whole.chunk(size, 1)[rank].flatten(0, 1)
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim: int = getattr(parameter, "partition_dim")  # noqa: B009
    part = whole.tensor_split([n * parameter.shape[dim] for n in range(1, size)], dim)[rank]
    missing = parameter.shape[dim] - part.shape[dim]
    if missing and name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
    return part
