"""SPD oracle: transformers' Llama in one process, with blocks that drop their first tensor-parallel reduction."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def drop(net: Any, blocks: Iterable[int], tp: int) -> Any:
    """Make ``blocks`` of ``net`` compute the equations of arXiv 2502.20727, 4.1.1, for ``tp`` ranks; return ``net``."""
    for block in blocks:
        layer = net.model.layers[block]
        layer.forward = partial(_dropped, layer, tp)
    return net


def _dropped(layer: Any, tp: int, hidden_states: Tensor, **known: Any) -> Tensor:
    attention, mlp, heads = layer.self_attn, layer.mlp, []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    attention(hidden_states=layer.input_layernorm(hidden_states), **known)
    hook.remove()
    out = hidden_states
    # Phi-3 has both in one matrix.
    gate, up = (
        (mlp.gate_proj.weight, mlp.up_proj.weight) if hasattr(mlp, "up_proj") else mlp.gate_up_proj.weight.chunk(2)
    )
    shares = zip(
        heads[0].chunk(tp, -1),
        attention.o_proj.weight.chunk(tp, 1),
        gate.chunk(tp),
        up.chunk(tp),
        mlp.down_proj.weight.chunk(tp, 1),
        strict=True,
    )
    for own, projection, gate, up, down in shares:
        y = own @ projection.T
        seen = layer.post_attention_layernorm(hidden_states + y)
        out = out + y + (torch.nn.functional.silu(seen @ gate.T) * (seen @ up.T)) @ down.T
    return out
