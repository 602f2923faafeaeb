"""Folders without weights, for models that are trained: config and tokenizer, as described or as another model's."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
# What a folder holds besides its weights and config.json: the tokenizer's files and generation's settings.
_COPIED = (
    "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "generation_config.json",
)  # fmt: skip


def write_described(config: Mapping[str, Any], to: Path) -> None:
    """A Hugging Face folder without weights: ``config``, in the words of its config.json, and a tokenizer of bytes.

    Raises ValueError if transformers knows no such model type, lacks one of the fields, cannot make a model
    of them, or if the vocabulary is smaller than the tokenizer's.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model.config.model_type={kind} is no language model of transformers: use llama")
    if unknown := set(fields) - set(AutoConfig.for_model(kind).to_dict()):
        raise ValueError(f"model.config.{min(unknown)}: a model of type {kind} has no such field")
    tokenizer = bytes_tokenizer()
    # Left to itself a Llama's text begins and ends with what are bytes here.
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    try:
        described = AutoConfig.for_model(kind, **ends | fields)
    except (StrictDataclassError, TypeError, ArithmeticError) as error:
        raise ValueError(f"model.config describes no model of type {kind}: {error}") from error
    if described.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.config.vocab_size={described.vocab_size}: the tokenizer has {len(tokenizer)} tokens; "
            "use that many, or more"
        )
    described.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    tokenizer.save_pretrained(to)
    described.save_pretrained(to)


def write_like(source: Path, changed: Mapping[str, Any], to: Path) -> None:
    """The folder ``to``: tokenizer and generation files of ``source``, and its config.json with fields ``changed``."""
    to.mkdir(parents=True)
    for file in {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, to / file.name)
    config = json.loads((source / "config.json").read_text())
    # Names of older transformers, which would win over today's.
    old = ["torch_dtype"] * ("dtype" in changed) + ["rope_theta", "rope_scaling"] * ("rope_parameters" in changed)
    config = {name: value for name, value in config.items() if name not in old} | dict(changed)
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def other_context(
    source: Path, max_positions: int | None, rope_theta: float | None, rope_factor: float | None
) -> dict[str, Any]:
    """The fields of ``source``'s config.json that `ModelSource`'s fields of these names change.

    Raises ValueError for a factor on a rotary embedding that is scaled already.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    rope = dict(config.rope_parameters)
    if rope_factor and rope["rope_type"] != "default":
        raise ValueError(
            f"model.rope_factor={rope_factor}: this model's rotary embedding is of type {rope['rope_type']} "
            "already; use model.rope_theta"
        )
    fields: dict[str, Any] = {"max_position_embeddings": max_positions} if max_positions else {}
    if rope_factor:
        fields.setdefault("max_position_embeddings", int(config.max_position_embeddings * rope_factor))
        rope |= {"rope_type": "linear", "factor": rope_factor}
    if rope_theta:
        rope["rope_theta"] = rope_theta
    return {**fields, "rope_parameters": rope} if rope_theta or rope_factor else fields


def bytes_tokenizer() -> Any:
    """A transformers tokenizer: byte n of a text's UTF-8 is token n, and one more ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    of_bytes = Tokenizer(models.BPE({letter: n for n, letter in enumerate(_letters())}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token=END, clean_up_tokenization_spaces=False)


def _letters() -> list[str]:
    """What stands for each byte in byte-level tokenizers: Latin-1 where that can be seen, else letters beyond it."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    beyond = iter(range(256, 512))
    return [chr(n if n in seen else next(beyond)) for n in range(256)]
