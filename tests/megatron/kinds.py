"""Small random models, one of each kind that longctx maps to megatron-core."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

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
}


def random_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """Write a random model of ``kind`` to ``folder``, in several files as large models have; return ``folder``.

    ``changed`` replaces fields of the kind's configuration.
    """
    torch.manual_seed(11)
    fields = KINDS[kind].to_dict() | changed
    fields.pop("layer_types", None)  # derived from the number of layers
    model = AutoModelForCausalLM.from_config(type(KINDS[kind])(**fields)).to(dtype)
    for parameter in model.parameters():  # biases and norms too, because default values would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder
