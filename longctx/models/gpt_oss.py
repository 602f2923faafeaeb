"""gpt-oss: experts with clamped gates and biases, attention sinks, windows on every second layer, YaRN."""

from typing import Any

from longctx.models.family import Config, Family, experts_of, refuse, windows_of


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu", swiglu_alpha=1.702)
    return {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": True,
        "sinks": True,
        "activation": "gelu_sigmoid",
        "glu_limit": config.swiglu_limit,
        "glu_offset": 1.0,
        "windows": windows_of(config),
        "experts": (experts_of(config, config.intermediate_size),) * config.num_hidden_layers,
    }


GPT_OSS = Family(
    "gpt_oss",
    "gpt-oss 20B and 120B",
    _options,
    stacked={
        "mlp.experts.gate_up_proj": ("mlp.experts.I.gate_proj.weight", "mlp.experts.I.up_proj.weight"),
        "mlp.experts.gate_up_proj_bias": ("mlp.experts.I.gate_proj.bias", "mlp.experts.I.up_proj.bias"),
        "mlp.experts.down_proj": ("mlp.experts.I.down_proj.weight",),
        "mlp.experts.down_proj_bias": ("mlp.experts.I.down_proj.bias",),
    },
    undeclared=("experts_per_token", "initial_context_length"),
)
