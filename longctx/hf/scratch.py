"""Write Hugging Face folders without weights: config.json and tokenizer files for a model to be trained.

A folder is either built from settings, or copied from an existing model with some config fields changed.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longctx.hf.config import read_config
from longctx.models import family_of
from longctx.text_file import write_text

END = "<|endoftext|>"
TEMPLATE = "chat_template.jinja"  # transformers prefers it to a template in tokenizer_config.json
MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # all of a model's templates but the default one
# Files that are copied besides config.json: those of the tokenizer, and the settings of generation.
COPIED = (
    "tokenizer*", "*.model", "*tekken*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", MORE_TEMPLATES, "generation_config.json",
)  # fmt: skip
# Those that earlier versions did not copy, the last one of a GGUF file: a folder that they wrote may lack them.
COPIED_LATER = ("*tekken*.json", MORE_TEMPLATES, "generation_config.json")
# Fields of config.json that must be whole numbers of 1 or more.
_SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip


def write_scratch_folder(config: Mapping[str, Any], to: Path) -> None:
    """Write the folder ``to`` from ``config``, which has the keys of a config.json, with a byte tokenizer.

    Raises ValueError if transformers does not know the model type or a field, or cannot build a model from the fields.
    Also raises ValueError if the vocabulary is smaller than the tokenizer's 257 tokens.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # 1) Check the names, before transformers silently keeps an unknown field.
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"model.config.model_type={model_type} is not a language model of transformers: "
            "use llama or another that recipes.models lists"
        )
    if unknown := set(fields) - set(AutoConfig.for_model(model_type).to_dict()):
        raise ValueError(
            f"model.config.{min(unknown)}: a model of type {model_type} has no such field: "
            "remove it, or correct its name"
        )
    # 2) Build the config.  Llama's default special tokens are ordinary bytes of this tokenizer, so override them.
    tokenizer = bytes_tokenizer()
    special_tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if isinstance(size := fields.get("vocab_size"), int) and size < len(tokenizer):
        raise ValueError(
            f"model.config.vocab_size={size}: the tokenizer has {len(tokenizer)} tokens; use that many, or more"
        )
    try:
        built = AutoConfig.for_model(model_type, **special_tokens | fields)
    except Exception as error:  # transformers may raise any class of error
        raise ValueError(
            f"model.config describes no model of type {model_type}: {error}; correct its fields"
        ) from error
    for name in _SIZES:
        size = getattr(built, name, None)
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"model.config.{name}={size}: use a whole number, 1 or more")
    # 3) Write both.
    built.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    tokenizer.save_pretrained(to)
    built.save_pretrained(to)


def write_folder_like(source: Path, changed: Mapping[str, Any], to: Path) -> None:
    """Create the folder ``to`` with the tokenizer and generation files of ``source``, and its config.json.

    The fields in ``changed`` replace those of the source's config.json.  Weights are not copied.
    """
    to.mkdir(parents=True)
    for file in copied_files(source):
        copy = to / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    write_config_like(source, changed, to)


def copied_files(folder: Path) -> set[Path]:
    """Return the files of ``folder`` that `write_folder_like` copies."""
    return {file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}


def write_config_like(source: Path, changed: Mapping[str, Any], to: Path) -> None:
    """Write the config.json of ``source`` to the folder ``to``, with the fields in ``changed`` replaced.

    If this changes nothing, the file has the same bytes, so that the model's fingerprint is the same.
    """
    stated = json.loads((source / "config.json").read_text())
    # Field names of older transformers versions would override today's.
    old = ["torch_dtype"] * ("dtype" in changed) + ["rope_theta", "rope_scaling"] * ("rope_parameters" in changed)
    config = {name: value for name, value in stated.items() if name not in old} | dict(changed)
    if config == stated:
        shutil.copyfile(source / "config.json", to / "config.json")
        return
    write_text(to / "config.json", json.dumps(config, indent=2) + "\n")


def read_chat_template(name: str) -> str:
    """Return the chat template in the file ``name``.  Raises ValueError if it is unreadable, empty or not Jinja."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = Path(name).expanduser()
    try:
        template = file.read_text(encoding="utf-8-sig")
        # The two tags that transformers adds to Jinja mark the tokens of answers.
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template={name} cannot be read: {error}; give a file of UTF-8 text") from error
    except TemplateError as error:
        raise ValueError(f"model.chat_template={name} is not a Jinja template: {error}; correct it") from error
    if not template.strip():
        raise ValueError(f"model.chat_template={name} is empty: give a Jinja template")
    return template


def config_for_context(
    source: Path,
    max_positions: int | None,
    rope_theta: float | None,
    rope_factor: float | None,
    rope_type: str = "linear",
) -> dict[str, Any]:
    """Return the fields of ``source``'s config.json that change for another maximum length or rotary embedding.

    None keeps the model's value.  With ``rope_factor``, ``max_positions`` defaults to the model's maximum times the
    factor.  ``rope_type`` says how the factor scales: "linear" or "yarn".

    Raises ValueError for a factor on a rotary embedding that is already scaled, and for a model in which each type of
    layers has a separate rotary embedding.  Also raises ValueError as `read_config` does.
    """
    config, stated = read_config(source / "config.json"), json.loads((source / "config.json").read_text())
    if not (rope_theta or rope_factor):
        longer = {"max_position_embeddings": max_positions}
        return {**longer, **_same_rotary(config, stated)} if max_positions else {}
    if family_of(config.model_type).rotary_by_layer_type:
        raise ValueError(
            "model.rope_theta and model.rope_factor: this model has a rotary embedding for each type of layers; "
            "change rope_parameters in a copy of its config.json"
        )
    rope = dict(config.rope_parameters)
    if rope_factor:
        _refuse_factor(rope_factor, config, rope["rope_type"])
    fields: dict[str, Any] = {"max_position_embeddings": max_positions} if max_positions else {}
    if rope_factor:
        fields.setdefault("max_position_embeddings", int(config.max_position_embeddings * rope_factor))
        rope |= {"rope_type": rope_type, "factor": rope_factor}
        if rope_type == "yarn":
            rope["original_max_position_embeddings"] = config.max_position_embeddings
    if rope_theta:
        same = _same_rotary(config, stated) if max_positions else {}
        rope |= {**same.get("rope_parameters", {}), "rope_theta": rope_theta}
    if "original_max_position_embeddings" in stated and "original_max_position_embeddings" in rope:
        # transformers prefers the value at the top of the file.
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {**fields, "rope_parameters": rope}


def _refuse_factor(rope_factor: float, config: Any, rope_type: str) -> None:
    """Raise ValueError if the rotary embedding of ``config``, of type ``rope_type``, cannot be scaled."""
    if family_of(config.model_type).longrope_only:
        raise ValueError(
            f"model.rope_factor={rope_factor}: transformers' {config.model_type} takes neither a linear factor nor "
            "YaRN; use model.rope_theta"
        )
    if rope_type != "default":
        raise ValueError(
            f"model.rope_factor={rope_factor}: this model's rotary embedding is of type {rope_type} "
            "already; use model.rope_theta"
        )


# Fields that must be stated for each type of rotary embedding, so that it does not depend on max_position_embeddings.
_FIXED = {
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "factor"),
}


def _same_rotary(config: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of config.json that makes a scaled rotary embedding independent of max_position_embeddings.

    transformers takes the original length from there if the file does not state it; LongRoPE also takes its factor from
    the ratio of the two lengths.  ``stated`` is the file's content.  The result is empty if the file states all that
    its rotary embedding needs, so that the fingerprint of such a model does not change.

    Raises ValueError for a model that has a rotary embedding for each type of layers and lacks such a field.
    """
    # transformers' own values are in config.rope_parameters: only the file says what is stated.
    in_file = {**stated, **(stated.get("rope_scaling") or {}), **(stated.get("rope_parameters") or {})}
    rope = dict(config.rope_parameters or {})
    if "rope_type" not in rope:  # by type of layers
        for kind, one in rope.items():
            of_kind = {**in_file, **(in_file[kind] if isinstance(in_file.get(kind), Mapping) else {})}
            needed = _FIXED.get(one.get("rope_type", ""), ()) if isinstance(one, Mapping) else ()
            if lacking := [name for name in needed if not of_kind.get(name)]:
                raise ValueError(
                    f"model.max_positions: the rotary embedding of {kind} in this model has no {lacking[0]}; add it in "
                    "a copy of its config.json"
                )
        return {}
    needed = _FIXED.get(rope["rope_type"], ())
    if all(name in in_file for name in needed):
        return {}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    values = {"original_max_position_embeddings": original, "factor": config.max_position_embeddings / original}
    return {"rope_parameters": {**rope, **{name: in_file.get(name) or values[name] for name in needed}}}


def bytes_tokenizer() -> Any:
    """Return a transformers tokenizer of 257 tokens: token n is byte n of UTF-8 text, and token 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(_byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def _byte_letters() -> list[str]:
    """Return each byte's letter in byte-level tokenizers: itself if printable Latin-1, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(n if n in printable else next(substitutes)) for n in range(256)]
