"""Granite 3: Llama with scales on embedding, attention scores, residual connections and logits."""

from typing import Any

from longctx.models.family import Config, Family, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return {
        "softmax_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


_TYPICAL = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
GRANITE = Family(
    "granite",
    "Granite 3",
    _options,
    typical=_TYPICAL,
)
