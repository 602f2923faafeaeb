"""Small random models, one of each kind that longctx maps to megatron-core."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)
from transformers.utils import logging

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "vocab_size": 211,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 5 / 7,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.3],
    "long_factor": [1.0, 1.9, 2.9, 4.1, 5.3],
}
NO_HEAD_DIM = {name: size for name, size in SMALL.items() if name != "head_dim"} | {"hidden_size": 84}
TWO_WINDOWS = {"sliding_window": 37, "layer_types": ["sliding_attention", "full_attention"]}
TWO_ROTARIES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
}
KINDS = {
    "tied llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama 3.1": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "qwen2, with biases": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 84}),
    "mistral, a window in all layers": MistralConfig(**SMALL, sliding_window=37),
    "qwen2, a window in the second layer": Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 84},
        use_sliding_window=True,
        sliding_window=101,
        max_window_layers=1,
    ),
    "llama with all biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2, yarn": Qwen2Config(**NO_HEAD_DIM, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SMALL, **TWO_WINDOWS, use_sliding_window=True),
    "smollm3": SmolLM3Config(
        **NO_HEAD_DIM, no_rope_layer_interval=2, pad_token_id=None, bos_token_id=1, eos_token_id=2
    ),
    "olmo2": Olmo2Config(**NO_HEAD_DIM, pad_token_id=None),
    "olmo3": Olmo3Config(**NO_HEAD_DIM, **TWO_WINDOWS, rope_parameters=TWO_ROTARIES, pad_token_id=None),
    "phi3": Phi3Config(**NO_HEAD_DIM, sliding_window=101, pad_token_id=None),
    "phi3, longrope": Phi3Config(
        **NO_HEAD_DIM, rope_parameters=LONG, original_max_position_embeddings=128, pad_token_id=None
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, **TWO_WINDOWS, rope_parameters=TWO_ROTARIES, query_pre_attn_scalar=11, pad_token_id=None
    ),
    "granite": GraniteConfig(
        **NO_HEAD_DIM, embedding_multiplier=7.0, attention_multiplier=0.3, residual_multiplier=0.4, logits_scaling=3.0
    ),
    "starcoder2": Starcoder2Config(**NO_HEAD_DIM, sliding_window=101, bos_token_id=1, eos_token_id=2),
    "glm4": Glm4Config(**SMALL, pad_token_id=None),
    "mixtral": MixtralConfig(**SMALL, sliding_window=101, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe, and a layer without experts": Qwen3MoeConfig(
        **SMALL, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=36, mlp_only_layers=[1]
    ),
    "gpt_oss": GptOssConfig(
        **SMALL,
        **TWO_WINDOWS,
        rope_parameters=YARN | {"truncate": False},
        num_local_experts=5,
        num_experts_per_tok=3,
        swiglu_limit=0.4,  # small activations reach it
    ),
}


# Changes to kinds, for numbers of experts that ranks can divide.
EVEN_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe, and a layer without experts": {"num_experts": 8, "num_local_experts": 8, "num_hidden_layers": 4},
    "gpt_oss": {"num_local_experts": 4},  # 3 of 4 experts: each token goes to every rank of two
}


def random_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """Write a random model of ``kind`` to ``folder``, in several files as large models have; return ``folder``.

    ``changed`` replaces fields of the kind's configuration.
    """
    logging.disable_progress_bar()  # it would be in the captured output of a test
    torch.manual_seed(11)
    fields = KINDS[kind].to_dict() | changed
    for name in ("layer_types", "no_rope_layers"):
        if len(fields.get(name) or []) != fields["num_hidden_layers"]:
            fields.pop(name, None)  # then derived from the number of layers
    model = AutoModelForCausalLM.from_config(type(KINDS[kind])(**fields)).to(dtype)
    for parameter in model.parameters():  # biases and norms too, because default values would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder
