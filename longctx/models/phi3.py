"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, and rotary embedding on a part of the channels."""

from typing import Any

from longctx.models.family import Config, Family, refuse


def _options(config: Config) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"windows": (config.sliding_window,) * config.num_hidden_layers}


PHI3 = Family(
    "phi3",
    "Phi-3, Phi-3.5, Phi-4",
    _options,
    partial_rotary=True,
    longrope_only=True,
    typical={"partial_rotary_factor": 0.75, "sliding_window": 2047},
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
