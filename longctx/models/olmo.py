"""OLMo 2 and 3: norms after attention and feed-forward network, QK-norm over all heads together."""

from typing import Any

from longctx.models.family import Config, Family, by_layer_type, refuse, rotary_of, windows_of

_NAMES = {
    "attention_output_layernorm": "post_attention_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
}


def _olmo2_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    return {"norms": "post", "qk_norm": "width"}


def _olmo3_options(config: Config) -> dict[str, Any]:
    rotaries = by_layer_type(config, lambda kind: rotary_of(config, kind))
    return {**_olmo2_options(config), "windows": windows_of(config), "rotaries": rotaries}


OLMO2 = Family("olmo2", "OLMo 2", _olmo2_options, _NAMES)
OLMO3 = Family("olmo3", "OLMo 3", _olmo3_options, _NAMES, rotary_by_layer_type=True)
