"""Qwen2 and Qwen2.5: biases on queries, keys and values.  Qwen3: norms of queries and keys per head."""

from typing import Any

from longctx.models.family import Config, Family, refuse, windows_of


def _qwen2_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"qkv_bias": True, "windows": windows_of(config)}


def _qwen3_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    biases = {"qkv_bias": config.attention_bias, "out_bias": config.attention_bias}
    return {**biases, "qk_norm": "head", "windows": windows_of(config)}


QWEN2 = Family("qwen2", "Qwen2, Qwen2.5", _qwen2_options, undeclared=("head_dim",))
QWEN3 = Family("qwen3", "Qwen3, dense", _qwen3_options)
