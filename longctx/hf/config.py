"""Read a Hugging Face folder: config.json as a `ModelShape`, and the tokenizer."""

import json
from pathlib import Path
from typing import Any

from longctx.model_shape import ModelShape
from longctx.models import Family, family_of


def shape_of(folder: Path) -> ModelShape:
    """Return the `ModelShape` of a Hugging Face folder.

    Raises ValueError if config.json cannot be read, and for a model type or a feature that is not implemented.
    """
    from transformers import AutoConfig

    family = family_in(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}/config.json is not a model's configuration: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} has quantised weights: use the model that it was made from")
    return family.shape(config, _end_tokens(folder, config))


def family_in(folder: Path) -> Family:
    """Return the family of the model in ``folder``.

    Raises ValueError if config.json cannot be read or names a model type that is not implemented.
    """
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json is not a model's configuration: {error}") from error
    return family_of(model_type)


def tokenizer_of(folder: Path) -> Any:
    """The transformers tokenizer of ``folder``.  Raises ValueError if transformers cannot read one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def refuse_dropout(folder: Path) -> None:
    """Raise ValueError if config.json sets attention dropout, which training does not implement."""
    dropout = json.loads((folder / "config.json").read_text()).get("attention_dropout")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: training here has no dropout, set it to 0 in config.json")


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
