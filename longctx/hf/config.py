"""Read a Hugging Face folder: config.json as a `ModelShape`, and the tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

from longctx.hf.generation import end_tokens
from longctx.hf.keys import refuse_unknown_keys
from longctx.model_shape import ModelShape
from longctx.models import Family, family_of
from longctx.models.family import head_dim_of

_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop")


def shape_of(folder: Path) -> ModelShape:
    """Return the `ModelShape` of a Hugging Face folder.

    Raises ValueError if config.json cannot be read, for a key that is not read (see `keys`), for a model type or a
    feature that is not implemented, and for dimensions that no model can have.
    """
    file = folder / "config.json"
    config = read_config(file)
    try:
        shape = family_of(config.model_type).shape(config, end_tokens(folder))
    except (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{file} describes no model of type {config.model_type}: {error!r}; correct it, or use another model"
        ) from error
    _refuse_infinite(file, shape)
    return shape


def family_in(folder: Path) -> Family:
    """Return the family of the model in ``folder``, whose config.json `shape_of` accepts."""
    return family_of(json.loads((folder / "config.json").read_text())["model_type"])


def read_config(file: Path) -> Any:
    """Return the config.json ``file`` as transformers reads it.  Raises ValueError as `shape_of` does."""
    from longctx.without_compiler import without_compiler  # imports torch, which takes a second

    with without_compiler():
        import transformers.activations  # noqa: F401, what every configuration imports
        from transformers import AutoConfig

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except Exception as error:  # transformers may raise any class of error
        _refuse_custom_code(file.parent, error)
        raise ValueError(
            f"{file} is not a model's configuration: {error}; correct it, or download the model again"
        ) from error
    family = family_of(config.model_type)
    if quantised := values.get("quantization_config"):
        method = (
            f" ({quantised['quant_method']})" if isinstance(quantised, dict) and "quant_method" in quantised else ""
        )
        raise ValueError(f"{file}: the weights are quantised{method}: use the model in bfloat16 or float32")
    refuse_unknown_keys(file, values, config, family)
    _refuse_impossible(file, config)
    _refuse_unfit_windows(file, config)
    return config


def _refuse_impossible(file: Path, config: Any) -> None:
    """Raise ValueError if ``config``, read from ``file``, has a dimension or number that no model can have.

    Examples are vocab_size=0, or KV heads that do not divide the query heads.
    """
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    experts = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    for name in (*names, "vocab_size", "max_position_embeddings", *experts):
        value = getattr(config, name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{file}: {name}={value} is not a positive number: correct it")
    for name in ("rms_norm_eps", "norm_epsilon", "initializer_range"):
        if not 0 <= getattr(config, name, 0) < math.inf:
            raise ValueError(f"{file}: {name}={getattr(config, name)} is not a number of 0 or more: correct it")
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
    if heads % kv_heads:
        raise ValueError(
            f"{file}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: correct one"
        )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"{file}: head_dim={head_dim} is not a positive even number, as rotary embeddings need: correct it, or "
            "hidden_size or num_attention_heads"
        )


def _refuse_infinite(file: Path, shape: ModelShape) -> None:
    """Raise ValueError if ``shape``, read from ``file``, has an infinite or NaN number.

    Rotary frequencies of 0 or less are refused as well.
    """
    for name, value in vars(shape).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{file}: {name}={value} is not a finite number: correct the settings that give it")
    for rotary in {*shape.rotaries}:
        if rotary and not all(0 < number < math.inf for number in (*rotary.frequencies, rotary.scale)):
            raise ValueError(f"{file}: its rotary frequencies are not positive numbers: correct rope_parameters")


def tokenizer_of(folder: Path) -> Any:
    """Return the transformers tokenizer in ``folder``.  Raises ValueError if transformers cannot read one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any class of error, such as KeyError
        _refuse_custom_code(folder, error)
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read: {error}; copy the tokenizer's files there"
        ) from error


def refuse_untrainable(folder: Path) -> None:
    """Raise ValueError if config.json sets dropout or noise of the router, which training does not implement.

    These settings have no effect in inference.
    """
    values = json.loads((folder / "config.json").read_text())
    for name in _DROPOUTS:
        if dropout := values.get(name):
            raise ValueError(f"{name}={dropout}: longctx trains without dropout; set it to 0 in config.json")
    if noise := values.get("router_jitter_noise"):
        raise ValueError(f"router_jitter_noise={noise}: longctx trains without noise; set it to 0 in config.json")


def _refuse_custom_code(folder: Path, error: Exception) -> None:
    """Raise ValueError if transformers raised ``error`` because it would have to run Python code from ``folder``."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{folder} needs custom Python code (auto_map), which longctx never runs: "
            "use a model and a tokenizer that transformers knows"
        ) from error


def _refuse_unfit_windows(file: Path, config: Any) -> None:
    """Raise ValueError if the settings of windows in ``config``, read from ``file``, do not fit each other.

    These are sliding_window, layer_types and the number of layers.
    """
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if window is not None and window < 1:
        raise ValueError(f"{file}: sliding_window={window} is not a positive number: correct it, or use null")
    if types and window is None and "sliding_attention" in types:
        raise ValueError(
            f"{file}: layer_types has sliding_attention, but sliding_window is not in use: set it "
            "(and use_sliding_window=true, if the model type has it) or use full_attention"
        )
    if types and len(types) != layers:
        raise ValueError(f"{file}: layer_types has {len(types)} entries, num_hidden_layers={layers}: correct one")
