"""Qwen2 and Qwen2.5: biases on queries, keys and values.  Qwen3: norms of queries and keys per head, and experts."""

from typing import Any

from longctx.models.family import Config, Family, experts_of, refuse, windows_of


def _qwen2_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"qkv_bias": True, "windows": windows_of(config)}


def _qwen3_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    biases = {"qkv_bias": config.attention_bias, "out_bias": config.attention_bias}
    return {**biases, "qk_norm": "head", "windows": windows_of(config)}


def _qwen3_moe_options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    layers = range(config.num_hidden_layers)
    experts = experts_of(config, config.moe_intermediate_size, renormalised=config.norm_topk_prob)
    dense = {layer for layer in layers if (layer + 1) % config.decoder_sparse_step} | {*config.mlp_only_layers}
    return {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "qk_norm": "head",
        "windows": (config.sliding_window,) * len(layers),
        "experts": tuple(None if layer in dense else experts for layer in layers),
    }


QWEN2 = Family("qwen2", "Qwen2, Qwen2.5", _qwen2_options, undeclared=("head_dim",))
QWEN3 = Family("qwen3", "Qwen3, dense", _qwen3_options)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3, with experts",
    _qwen3_moe_options,
    {"mlp.router": "mlp.gate"},
    undeclared=("max_window_layers", "num_local_experts"),
)
