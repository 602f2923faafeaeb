"""SmolLM3: Llama in which some layers have no rotary embedding."""

from typing import Any

from longctx.models.family import Config, Family, refuse, rotary_of, windows_of


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu", mlp_bias=False)
    rotary = rotary_of(config)
    biases = {"qkv_bias": config.attention_bias, "out_bias": config.attention_bias}
    if "sliding_attention" in config.layer_types and not config.use_sliding_window:
        raise ValueError(
            "layer_types has sliding_attention, but use_sliding_window is false, which transformers' implementations "
            "of attention treat differently: correct one in config.json"
        )
    rotaries = tuple(rotary if has else None for has in config.no_rope_layers)
    return {**biases, "rotaries": rotaries, "windows": windows_of(config)}


SMOLLM3 = Family("smollm3", "SmolLM3", _options, undeclared=("max_window_layers",))
