"""StarCoder2: LayerNorm, a feed-forward network without gate, biases everywhere."""

from typing import Any

from longctx.models.family import Config, Family, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="gelu_pytorch_tanh")
    return {
        "norm_eps": config.norm_epsilon,
        "layer_norm": True,
        "gated": False,
        "activation": "gelu_tanh",
        "qkv_bias": config.use_bias,
        "out_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "windows": (config.sliding_window,) * config.num_hidden_layers,
    }


STARCODER2 = Family(
    "starcoder2",
    "StarCoder2",
    _options,
    names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    undeclared=(
        "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type", "norm_type",
        "scale_attention_softmax_in_fp32", "scale_attn_weights",
    ),
)  # fmt: skip
