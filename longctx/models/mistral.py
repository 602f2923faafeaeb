"""Mistral: Llama with one sliding window for all layers."""

from typing import Any

from longctx.models.family import Config, Family, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"windows": (config.sliding_window,) * config.num_hidden_layers}


MISTRAL = Family("mistral", "Mistral 7B, Ministral", _options)
