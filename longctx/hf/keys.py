"""Settings in config.json that are read: each other one is refused, unless it changes nothing in transformers.

transformers keeps any key of config.json and lets some code read it.  A key that its configuration class does not
declare is therefore refused, because this code would read it otherwise, or not at all.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

# Keys that no class declares and that change no logits, whatever their value.
_HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "attn_implementation", "decoder_start_token_id", "finetuning_task", "gradient_checkpointing",
    "is_decoder", "is_llama_config", "model_type", "name_or_path", "num_labels", "output_attentions", "prefix",
    "pretraining_tp", "rope_scaling", "rope_theta", "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "use_bfloat16",
}  # fmt: skip
# Settings of generation, which transformers drops from config.json: generation_config.json has them.
GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Keys that no class declares, and the value with which they change nothing.
_NEUTRAL: Mapping[str, object] = {
    "is_causal": True,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "rope_interleaved": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
}
# Keys that a family's code reads although its class does not declare them.
_UNDECLARED: Mapping[str, tuple[str, ...]] = {"llama": (), "qwen2": ("head_dim",), "mistral": ()}
_LAYER_TYPES = ("full_attention", "sliding_attention")
# The types of rotary embeddings that are implemented, each with its numbers.
_ROPE: Mapping[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def unmapped(feature: str) -> ValueError:
    """Return the error of a model that has ``feature``, which the megatron-core model does not implement."""
    return ValueError(
        f"this model has {feature}, which is not mapped to megatron-core: "
        "use a model of type llama, qwen2 or mistral with SiLU and no other biases"
    )


def refuse_unknown_keys(file: Path, values: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError for a key of config.json that is not read here, unless it changes nothing in transformers.

    ``values`` is the content of ``file``, ``config`` the same as transformers reads it.  null is as good as no key.
    Raises ValueError, too, for kinds of layers and rotary embeddings that are not implemented.
    """
    if config.model_type not in _UNDECLARED:
        raise unmapped(f"model_type={config.model_type}")
    known = {field.name for field in fields(config)} | _HARMLESS | GENERATION | {*_UNDECLARED[config.model_type]}
    for key, value in values.items():
        if value is None or key in known or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        raise ValueError(
            f"{file}: {key}={value} is not a setting of transformers' {config.model_type} models and is not read here: "
            "remove it if it means nothing, or use a model whose type has it"
        )
    if other := {*(getattr(config, "layer_types", None) or ())} - {*_LAYER_TYPES}:
        raise ValueError(f"{file}: layer_types has {min(other)}: use a model with {' and '.join(_LAYER_TYPES)} only")
    _refuse_other_rope(file, config.rope_parameters)


def _refuse_other_rope(file: Path, rope: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``rope`` is a type that is implemented, with its numbers and nothing else."""
    rope_type = rope.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in _ROPE:
        raise ValueError(
            f"{file}: rope_type={rope_type} scales angles or changes them with the length, which is not implemented: "
            "use a model with rope_type default, linear or llama3"
        )
    for key in _ROPE[rope_type]:
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{file}: {key}={value} of rope_type={rope_type} is not a positive number: correct it")
    for key, value in rope.items():
        if key not in {"rope_type", "type", *_ROPE[rope_type]} and value not in (None, _NEUTRAL.get(key)):
            raise ValueError(f"{file}: {key}={value} is not read with rope_type={rope_type}: use a model without it")
