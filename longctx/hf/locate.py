"""Resolve the model settings to a local Hugging Face folder: fetch, convert or write it on first use."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from longctx.chat_date import with_date
from longctx.config import ModelSource
from longctx.hf.checkpoint import export_advice
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.gguf_file import CONVERSION, Say, convert, convert_wheel
from longctx.hf.scratch import (
    COPIED,
    MORE_TEMPLATES,
    TEMPLATE,
    config_for_context,
    read_chat_template,
    write_config_like,
    write_scratch_folder,
)
from longctx.text_file import write_text


def locate(model: ModelSource, say: Say = lambda _: None) -> Path:
    """Return the folder with config, tokenizer and safetensors of ``model``; fetch and convert it on first use.

    ``say`` receives progress lines.  A model given by ``model.config`` has no safetensors yet.  If the settings change
    the model's maximum length, rotary embedding or chat template, the folder has new files and links to the weights.

    Raises ValueError if the model cannot be found or fetched, and if a download has another checksum than expected.
    Raises ValueError if ``model.config``, a GGUF file or the changes are not valid.
    """
    folder = _resolve_source(model, say)
    if model.max_positions or model.rope_theta or model.rope_factor or model.chat_template or model.date:
        return _change(model, folder)
    return folder


def _resolve_source(model: ModelSource, say: Say) -> Path:
    """Return the folder of ``model`` without changes: from a wheel, ``model.config``, a local path or the hub."""
    if model.wheel:
        # The key lacks CONVERSION: the files in configs/model name one end token, so their folders did not change.
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
        key = f"{CONVERSION} {folder.resolve()} {state.st_size} {state.st_mtime_ns}"
        return _build_cached(model, hashlib.sha256(key.encode()).hexdigest(), lambda to: convert(folder, to, say))
    if folder.is_file():
        raise ValueError(
            f"model={model.source} is a file: give a Hugging Face folder, with config.json and safetensors, or a .gguf"
        )
    if folder.exists():
        fix = export_advice(folder) or "give a Hugging Face folder"
        raise ValueError(f"model={model.source}: no config.json in this folder; {fix}")
    # ``a/b`` may be a path or a hub name: it is a path if the folder ``a`` exists.
    if model.source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"model={model.source}: there is no such folder; give a Hugging Face folder, or a hub name ORG/MODEL "
            f"(read as a path if a folder {folder.parent} exists)"
        )
    return _fetch_from_hub(model.source, say)


def _change(model: ModelSource, source: Path) -> Path:
    """Return the cached folder with ``source``'s config.json and chat template, changed as the settings ``model`` ask.

    Its other files are links to those in ``source``: a file that changes there changes in the cached folder, too.  A
    new chat template replaces all templates of ``source``.
    """
    changed = config_for_context(source, model.max_positions, model.rope_theta, model.rope_factor, model.rope_type)
    template = read_chat_template(model.chat_template) if model.chat_template else None
    if model.date:
        template = with_date(tokenizer_of(source).chat_template if template is None else template, model.date)
    files = (*sorted(source.iterdir()), *(more_templates := sorted(source.glob(MORE_TEMPLATES))))
    existing = {str(file.relative_to(source)): file.resolve() for file in files if file.is_file()}  # the hub has links
    key = ["links 2", (source / "config.json").read_text(), repr(existing), repr(changed)]
    if template is not None:
        key.append(template)

    def write(to: Path) -> None:
        to.mkdir(parents=True)
        write_config_like(source, changed, to)
        replaced = {"config.json"}
        if template is not None:
            write_text(to / TEMPLATE, template)
            replaced |= {TEMPLATE, *(str(file.relative_to(source)) for file in more_templates)}
        for name in existing.keys() - replaced:
            (to / name).parent.mkdir(exist_ok=True)
            (to / name).symlink_to(existing[name])

    return _build_cached(model, hashlib.sha256("\n".join(key).encode()).hexdigest(), write)


def _fetch_from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns)))
        except Exception as error:  # also those of the HTTP library, which differs between versions of the hub's
            if isinstance(error, OSError) and error.errno:  # an error of this machine, such as a full disk
                raise
            raise ValueError(_hub_fault(name, error)) from error

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(_hub_fault(name, error)) from error
    say(f"fetching {name} from the Hugging Face hub")
    # Configuration first: `shape_of` refuses unsupported models before their weights are downloaded.
    small = ("*.json", *COPIED)
    shape_of(fetch(*small))
    return fetch(*small, "model*.safetensors")


def _hub_fault(name: str, error: Exception) -> str:
    """Return why the hub did not give the model ``name``, by the ``error`` of its library, and what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    is_gated = isinstance(error, GatedRepoError)
    if isinstance(error, HFValidationError | RepositoryNotFoundError) and not is_gated:
        return (
            f"model={name} is neither a local folder nor a public model of the hub: give a name from configs/model, "
            "a folder, or a hub name; for a private model, log in with hf auth login"
        )
    if is_gated or (isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)):
        return (
            f"model={name}: the hub gives this model only to users who have access: accept its terms at "
            f"https://huggingface.co/{name}, then log in with hf auth login"
        )
    return (
        f"model={name} is neither a local folder nor complete in the hub's cache, and the hub cannot be reached "
        f"({type(error.__cause__ or error).__name__}): download it on another machine and give its folder, or copy "
        "that machine's cache (HF_HOME) and set HF_HUB_OFFLINE=1"
    )


def _build_cached(model: ModelSource, digest: str, build: Callable[[Path], None]) -> Path:
    """Return the cache folder of ``model`` and ``digest``; if it does not exist, ``build(to)`` makes it.

    ``to`` is a temporary path.  The folder is then renamed into place, so it appears whole or not at all.  A file lock
    lets only one process build.  Raises ValueError if the folder does not exist and ``model.cache`` cannot be written.
    """
    from filelock import FileLock

    cache = Path(model.cache).expanduser()
    folder = cache / f"{model.name}-{digest[:12]}"
    if (folder / "config.json").is_file():  # without a lock: the cache may be read-only
        return folder
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache / f"{model.name}.lock", mode=0o666))  # for all users of the cache
            work = stack.enter_context(tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.name}."))
        except OSError as error:
            raise ValueError(f"model.cache={model.cache} cannot be written: {error}; give a writable folder") from error
        if not (folder / "config.json").is_file():  # another process may have built it meanwhile
            build(Path(work, "folder"))
            shutil.rmtree(folder, ignore_errors=True)
            Path(work, "folder").rename(folder)
    return folder
