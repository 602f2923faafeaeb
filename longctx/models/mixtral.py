"""Mixtral: Mistral with experts in every layer."""

from typing import Any

from longctx.models.family import Config, Family, experts_of, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    layers = config.num_hidden_layers
    return {
        "windows": (config.sliding_window,) * layers,
        "experts": (experts_of(config, config.intermediate_size),) * layers,
    }


MIXTRAL = Family(
    "mixtral",
    "Mixtral 8x7B and 8x22B",
    _options,
    names={
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.I.gate_proj": "block_sparse_moe.experts.I.w1",
        "mlp.experts.I.up_proj": "block_sparse_moe.experts.I.w3",
        "mlp.experts.I.down_proj": "block_sparse_moe.experts.I.w2",
    },
)
