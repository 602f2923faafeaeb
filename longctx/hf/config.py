"""Read a Hugging Face folder: config.json as a `ModelShape`, and the tokenizer."""

import json
from pathlib import Path
from typing import Any

from longctx.model_shape import ModelShape, Rotary


def shape_of(folder: Path) -> ModelShape:
    """The `ModelShape` of a Llama-architecture folder (Llama 2/3, SmolLM2, Qwen2, Mistral).

    Raises ValueError if config.json cannot be read, and for an architecture or a feature that is not mapped to
    megatron-core.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}/config.json is not a model's configuration: {error}") from error
    except ValueError as error:
        _refuse_custom_code(folder, error)
        raise
    _refuse_unmapped(config)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        rotary=_rotary(config),
        end_tokens=_end_tokens(folder, config),
        windows=_windows(config),
        init_std=config.initializer_range,
    )


def tokenizer_of(folder: Path) -> Any:
    """The transformers tokenizer of ``folder``.  Raises ValueError if transformers cannot read one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        _refuse_custom_code(folder, error)
        raise ValueError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def refuse_dropout(folder: Path) -> None:
    """Raise ValueError if config.json sets attention dropout, which training does not implement."""
    dropout = json.loads((folder / "config.json").read_text()).get("attention_dropout")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: training here has no dropout, set it to 0 in config.json")


def _refuse_custom_code(folder: Path, error: Exception) -> None:
    """Raise ValueError if transformers raised ``error`` because it would have to run Python code from ``folder``."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{folder} needs Python code of its own (auto_map), which longctx never runs: "
            "use a model of type llama, qwen2 or mistral, with a tokenizer that transformers knows"
        ) from error


def _refuse_unmapped(config: Any) -> None:
    """Raise ValueError for the first feature of ``config`` that the megatron-core model does not implement."""
    known = config.model_type in ("llama", "qwen2", "mistral")
    unmapped = {
        f"model_type={config.model_type}": not known,
        "attention_bias=true (a bias on the output projection)": getattr(config, "attention_bias", False)
        and config.model_type == "llama",
        "mlp_bias=true": getattr(config, "mlp_bias", False),
        f"hidden_act={getattr(config, 'hidden_act', None)}": getattr(config, "hidden_act", None) != "silu",
        "quantised weights": getattr(config, "quantization_config", None) is not None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None) is not None,
    }
    for feature, present in unmapped.items():
        if present:
            raise ValueError(
                f"this model has {feature}, which is not mapped to megatron-core: "
                "use a model of type llama, qwen2 or mistral with SiLU and no other biases"
            )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Sliding window of each layer (None: all keys); without layer_types (Mistral), all layers have the same."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rotary(config: Any) -> Rotary:
    """Rotary frequencies as transformers computes them, including linear scaling and that of Llama 3.1."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope_type={rope['rope_type']} scales angles or changes them with the length, which is not implemented: "
            "use a model with rope_type default, linear or llama3"
        )
    frequencies = LlamaRotaryEmbedding(config).inv_freq.tolist()
    return Rotary(tuple(frequencies))


def _end_tokens(folder: Path, config: Any) -> tuple[int, ...]:
    """Tokens that end an answer; as in transformers, generation_config.json overrides config.json."""
    from transformers import GenerationConfig

    ends = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
        ends = generation.eos_token_id if generation.eos_token_id is not None else ends
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)
