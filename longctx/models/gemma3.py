"""Gemma 3, text only: norms before and after, 1 + weight in norms, GELU, two rotary bases, windows on most layers."""

from typing import Any

from longctx.models.family import Config, Family, by_layer_type, refuse, rotary_of, windows_of


def _options(config: Config) -> dict[str, Any]:
    refuse(
        config,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        final_logit_softcapping=None,
        attn_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    return {
        "norms": "sandwich",
        "zero_centered": True,
        "qk_norm": "head",
        "activation": "gelu_tanh",
        "softmax_scale": config.query_pre_attn_scalar**-0.5,
        "embedding_scale": config.hidden_size**0.5,
        "windows": windows_of(config),
        "rotaries": by_layer_type(config, lambda kind: rotary_of(config, kind)),
    }


GEMMA3 = Family(
    "gemma3_text",
    "Gemma 3, text",
    _options,
    undeclared=("rope_local_base_freq", "sliding_window_pattern"),
    rotary_by_layer_type=True,
    names={
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "attention_output_layernorm": "post_attention_layernorm",
        "mlp_output_layernorm": "post_feedforward_layernorm",
    },
)
