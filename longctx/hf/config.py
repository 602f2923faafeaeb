"""Read a Hugging Face folder: config.json as a `ModelShape`, and the tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

from longctx.hf.generation import end_tokens
from longctx.hf.keys import refuse_unknown_keys, unmapped
from longctx.model_shape import ModelShape, Rotary


def shape_of(folder: Path) -> ModelShape:
    """The `ModelShape` of a Llama-architecture folder (Llama 2/3, SmolLM2, Qwen2, Mistral).

    Raises ValueError if config.json cannot be read, for a key that is not read (see `keys`), for an architecture or a
    feature that is not mapped to megatron-core, and for dimensions that no model can have.
    """
    config = read_config(folder / "config.json")
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        ffn=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        rotary=_rotary(config),
        end_tokens=end_tokens(folder, config),
        windows=_windows(folder / "config.json", config),
        init_std=config.initializer_range,
    )


def read_config(file: Path) -> Any:
    """Return the config.json ``file`` as transformers reads it.  Raises ValueError where `shape_of` does."""
    from transformers import AutoConfig

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
        config = AutoConfig.from_pretrained(file.parent)
    except Exception as error:  # transformers raises a class of its own for each mistake
        raise ValueError(f"{file} is not a model's configuration: {error}") from error
    if values.get("quantization_config"):
        raise unmapped("quantised weights")
    refuse_unknown_keys(file, values, config)
    _refuse_unmapped(config)
    _refuse_impossible(file, config)
    return config


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _refuse_impossible(file: Path, config: Any) -> None:
    """Raise ValueError for dimensions and numbers that no model can have."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in (*names, "vocab_size", "max_position_embeddings"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{file}: {name}={value} is not a positive number: correct it")
    for name in ("rms_norm_eps", "initializer_range"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{file}: {name}={getattr(config, name)} is not a number from 0 on: correct it")
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
    if heads % kv_heads:
        raise ValueError(f"{file}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{file}: head_dim={head_dim} is not a positive even number, as rotary embeddings need")


def tokenizer_of(folder: Path) -> Any:
    """The transformers tokenizer of ``folder``.  Raises ValueError if transformers cannot read one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file raises any class, such as KeyError
        raise ValueError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def refuse_dropout(folder: Path) -> None:
    """Raise ValueError if config.json sets attention dropout, which training does not implement."""
    dropout = json.loads((folder / "config.json").read_text()).get("attention_dropout")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: training here has no dropout, set it to 0 in config.json")


def _refuse_unmapped(config: Any) -> None:
    """Raise ValueError for the first feature of ``config`` that the megatron-core model does not implement."""
    features = {
        "attention_bias=true (a bias on the output projection)": getattr(config, "attention_bias", False)
        and config.model_type == "llama",
        "mlp_bias=true": getattr(config, "mlp_bias", False),
        f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
    }
    for feature, present in features.items():
        if present:
            raise unmapped(feature)


def _windows(file: Path, config: Any) -> tuple[int | None, ...]:
    """Sliding window of each layer (None: all keys); without layer_types (Mistral), all layers have the same.

    Raises ValueError if the windows and the types of layers do not fit each other.
    """
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if window is not None and window < 1:
        raise ValueError(f"{file}: sliding_window={window} is not a positive number: correct it, or use null")
    if types and window is None and "sliding_attention" in types:
        raise ValueError(f"{file}: layer_types has sliding_attention, and sliding_window is not in use: set both alike")
    if types and len(types) != layers:
        raise ValueError(f"{file}: layer_types has {len(types)} entries, num_hidden_layers={layers}: correct one")
    return tuple(window if kind == "sliding_attention" else None for kind in types or ["sliding_attention"] * layers)


def _rotary(config: Any) -> Rotary:
    """Rotary frequencies as transformers computes them, including linear scaling and that of Llama 3.1."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return Rotary(tuple(LlamaRotaryEmbedding(config).inv_freq.tolist()))
