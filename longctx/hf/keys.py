"""The keys of config.json that are read: any other key is refused, unless it has no effect in transformers.

transformers keeps every key of config.json, and its model code may read any of them.  A key that the configuration
class of transformers does not declare is therefore refused: longctx would read it differently, or not at all.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from longctx.models import Family

# Keys that some classes do not declare, but that change no logits or that transformers reads for every family.
_HARMLESS = {
    "attn_implementation", "auto_map", "cache_implementation", "decoder_start_token_id", "finetuning_task",
    "gradient_checkpointing", "head_dim", "is_decoder", "is_llama_config", "model_type", "name_or_path",
    "num_labels", "original_max_position_embeddings", "output_attentions", "prefix", "pretraining_tp",
    "rope_scaling", "rope_theta", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers.js_config", "unsloth_fixed", "unsloth_version", "use_bfloat16",
}  # fmt: skip
# Settings of generation, which transformers reads from config.json if there is no generation_config.json.
GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Keys that no class declares, with the values that change nothing.
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
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
# The implemented types of rotary embeddings: for each, the numbers that it needs, and the other keys that it reads.
_ROPE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": (("rope_theta",), ()),
    "linear": (("rope_theta", "factor"), ()),
    "llama3": (
        ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()
    ),
    "yarn": (
        ("rope_theta", "factor"),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
    "longrope": (
        ("rope_theta",),
        ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
    ),
}  # fmt: skip


def refuse_unknown_keys(file: Path, values: Mapping[str, Any], config: Any, family: Family) -> None:
    """Raise ValueError for a key of config.json that is not read here, unless it changes nothing in transformers.

    ``values`` is the content of ``file``; ``config`` is what transformers makes of it.  A null counts as a missing key.
    Rotary embeddings that are not implemented also raise ValueError.
    """
    known = {field.name for field in fields(config)} | _HARMLESS | GENERATION | {*family.undeclared}
    known |= {"partial_rotary_factor"} if family.partial_rotary else set()
    for key, value in values.items():
        # Keys that begin with an underscore are notes of the library that wrote the file, or are read by the
        # configuration class.  Ids of special tokens are the tokenizer's.
        is_note = value is None or key.startswith("_") or key.endswith("_token_id")
        if is_note or key in known or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        raise ValueError(
            f"{file}: {key}={value} is not a setting of transformers' {config.model_type} models and is not read here: "
            "remove it if it has no effect on the model, or use a model whose type has it"
        )
    rope = config.rope_parameters
    for each in rope.values() if family.rotary_by_layer_type else [rope]:
        _refuse_other_rope(file, each, family)


def _refuse_other_rope(file: Path, rope: Any, family: Family) -> None:
    """Raise ValueError unless ``rope``, the rotary settings of config.json, is of a type that is implemented.

    Its numbers must be positive, and it may have no other keys.
    """
    rope_type = rope.get("rope_type") if isinstance(rope, Mapping) else None
    if not isinstance(rope_type, str) or rope_type not in _ROPE:
        raise ValueError(f"{file}: rope_type={rope_type} is not implemented: use one of {', '.join(_ROPE)}")
    numbers, others = _ROPE[rope_type]
    for key in numbers:
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{file}: {key}={value} of rope_type={rope_type} is not a positive number: correct it")
    read = {"rope_type", "type", *numbers, *others} | ({"partial_rotary_factor"} if family.partial_rotary else set())
    for key, value in rope.items():
        if key not in read and value not in (None, _NEUTRAL.get(key)):
            raise ValueError(
                f"{file}: longctx does not implement {key}={value} with rope_type={rope_type}: use a model without it"
            )
