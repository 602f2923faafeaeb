"""GLM-4-0414: norms before and after, interleaved rotary embedding on half of each head's channels."""

from typing import Any

from longctx.models.family import Config, Family, refuse, rotary_of


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    rotary = rotary_of(config, interleaved=True)
    return {
        "norms": "sandwich",
        "qkv_bias": config.attention_bias,
        "rotaries": (rotary,) * config.num_hidden_layers,
    }


GLM4 = Family(
    "glm4",
    "GLM-4-0414",
    _options,
    partial_rotary=True,
    names={
        "attention_output_layernorm": "post_self_attn_layernorm",
        "mlp_output_layernorm": "post_mlp_layernorm",
    },
    fused={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
)
