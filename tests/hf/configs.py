"""Small configurations of Hugging Face models, and the folders in a cache."""

from pathlib import Path

from transformers import (
    PreTrainedConfig,
)

from longctx.config import ModelSource

SIZES = {
    "vocab_size": 307, "hidden_size": 60, "intermediate_size": 59, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 97, "rms_norm_eps": 3e-5, "eos_token_id": 13,
}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 31,
}  # fmt: skip


def save_config(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


def cached_folders(model: ModelSource) -> list[str]:
    """Names of the folders in the model's cache."""
    return [path.name for path in Path(model.cache).iterdir() if path.suffix != ".lock"]
