"""SPD oracle: transformers' models in one process, with blocks that drop their first tensor-parallel reduction."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Names of a layer's norms: before attention, of attention's output, before the MLP, of the MLP's output.
LLAMA = ("input_layernorm", "", "post_attention_layernorm", "")
NORMS = {
    "gemma3_text": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "glm4": ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "olmo2": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "olmo3": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
}


Total = Callable[[list[Tensor]], Tensor]


def drop(net: Any, blocks: Iterable[int], tp: int, total: Total = sum) -> Any:
    """Make ``blocks`` of ``net`` compute the equations of SPD for ``tp`` ranks; return ``net``.

    The equations are from arXiv 2502.20727, 4.1; for models with output norms, from longctx/spd/README.md.  ``total``
    sums the ranks' tensors.
    """
    names = NORMS.get(net.config.model_type, LLAMA)
    for block in blocks:
        layer = net.model.layers[block]
        norms = [getattr(layer, name) if name else torch.nn.Identity() for name in names]
        layer.forward = partial(_dropped, layer, norms, tp, total)
    return net


def _dropped(
    layer: Any, norms: list[Callable[[Tensor], Tensor]], tp: int, total: Total, hidden_states: Tensor, **known: Any
) -> Tensor:
    attention, mlp, heads = layer.self_attn, layer.mlp, []
    before_attention, after_attention, before_mlp, after_mlp = norms
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    attention(hidden_states=before_attention(hidden_states), **known)
    hook.remove()
    # Phi-3 and GLM-4 have both in one matrix.
    gate, up = (
        (mlp.gate_proj.weight, mlp.up_proj.weight) if hasattr(mlp, "up_proj") else mlp.gate_up_proj.weight.chunk(2)
    )
    activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
    scale = getattr(layer, "residual_multiplier", 1.0)  # Granite
    ys, zs = [], []
    shares = zip(
        heads[0].chunk(tp, -1),
        attention.o_proj.weight.chunk(tp, 1),
        gate.chunk(tp),
        up.chunk(tp),
        mlp.down_proj.weight.chunk(tp, 1),
        strict=True,
    )
    for own, projection, gate, up, down in shares:
        ys.append(own @ projection.T)
        seen = before_mlp(hidden_states + scale * after_attention(ys[-1]))
        zs.append((activation(seen @ gate.T) * (seen @ up.T)) @ down.T)
    if isinstance(after_attention, torch.nn.Identity):
        return hidden_states + scale * total([y + z for y, z in zip(ys, zs, strict=True)])
    y, z = total([torch.cat(both, -1) for both in zip(ys, zs, strict=True)]).chunk(2, -1)
    return hidden_states + scale * (after_attention(y) + after_mlp(z))
