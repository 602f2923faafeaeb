"""Llama 2 and 3, SmolLM and SmolLM2, TinyLlama, Yi: the decoder that other families differ from."""

from typing import Any

from longctx.models.family import Config, Family, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    biases = {"qkv_bias": config.attention_bias, "out_bias": config.attention_bias}
    return {**biases, "mlp_bias": config.mlp_bias}


LLAMA = Family("llama", "Llama 2 and 3, SmolLM2, TinyLlama", _options)
