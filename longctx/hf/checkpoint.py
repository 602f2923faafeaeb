"""Locate the tensors of a Hugging Face folder in its safetensors files, and compute a digest of its weights."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from longctx.checkpoint_index import RUN, checkpoint_folders
from longctx.hf.digests import sha256_of_files

# Weights that are valid only on tensor-parallel ranks; transformers does not load a file of this name.
ADAPTED = "spd.safetensors"
DROPPED = "dropped."  # prefix, in that file, of tensors for a block that drops a reduction
# Norms that may have different weights on each rank in spd.safetensors.
NORMS_OF_RANKS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # first bytes of the text that Git LFS leaves in place of a file
_PIECE = 4096  # bytes read at each of three places of a tensor


class TensorHeader(NamedTuple):
    """Dtype, by its safetensors name such as BF16, and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map each tensor name of ``folder`` to the safetensors file that holds it.

    If the folder has both, model.safetensors is used and the index of several files is ignored, as in transformers.
    The files that an index names are not opened.

    Raises ValueError in three cases.

    * The folder has none of model.safetensors, spd.safetensors and the index.
    * The folder has spd.safetensors together with model.safetensors or the index.
    * The index, or the only file of weights, cannot be read.
    """
    existing = [name for name in (ADAPTED, _WHOLE, _INDEX) if (folder / name).is_file()]
    if existing[:1] == [ADAPTED] and len(existing) > 1:
        raise ValueError(f"{folder} has the weights of two models, {ADAPTED} and {existing[1]}: move one of them away")
    if existing == [_INDEX]:
        return {name: folder / file for name, file in _weight_map(folder / _INDEX).items()}
    if not existing:
        fix = "convert the model to safetensors first, with transformers' save_pretrained"
        if not any(file.suffix in (".bin", ".pt", ".pth", ".gguf") for file in folder.iterdir()):
            fix = "this model has no weights yet, train it with recipes.pretrain, or copy its weights there"
            fix = export_advice(folder) or fix
        raise ValueError(f"{folder} has no model.safetensors: {fix}")
    with open_tensors(folder / existing[0]) as file:
        return dict.fromkeys(file.keys(), folder / existing[0])


def export_advice(folder: Path) -> str:
    """Return how to export the training run that ``folder`` belongs to; the empty string if it belongs to none.

    ``folder`` may be the folder of the run, a checkpoint, or another folder in that of the run.
    """
    folder = folder.absolute()
    runs = [run for run in (folder, folder.parent) if checkpoint_folders(run / "checkpoints")]
    if (folder / RUN).is_file():
        run, checkpoint = folder.parent.parent, folder
    elif runs:
        run = checkpoint = runs[0]
    else:
        return ""
    to = run / "hf"
    model = shlex.quote(_setting("model", to))
    if (to / "config.json").is_file():
        return (
            f"it belongs to a training run that was exported: give {model}, which may be of an earlier step, or export "
            "it again to a new folder"
        )
    return f"it belongs to a training run: export that with {export_command(checkpoint, to)}, then give {model}"


def export_command(checkpoint: Path, to: Path) -> str:
    """Return the command, as typed in a shell, that exports ``checkpoint``, or the last one of a run, to ``to``."""
    words = (_setting("checkpoint", checkpoint), _setting("to", to))
    return shlex.join(["python", "-m", "recipes.export", *words])


def _setting(key: str, path: Path) -> str:
    """Return a setting as a recipe takes it: a path with characters of lists and settings is quoted."""
    return f"{key}='{path}'" if re.search(r"[,=(){}\[\]:]", str(path)) else f"{key}={path}"


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in ``index``.  Raises ValueError if the index has no such map."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = {*weight_map.values()}
        if any(Path(name).name != name for name in names):
            raise TypeError("weight_map has an entry that is not a file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}): copy or download it again") from error
    return weight_map


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file and yield the reader of the safetensors library, which returns torch tensors.

    Raises ValueError if the file is missing, truncated or otherwise damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing, although the index names it: copy or download it again") from error
    except (OSError, SafetensorError) as error:
        if _is_pointer(file):
            raise ValueError(f"{file} is a pointer of Git LFS, not the weights: run git lfs pull there") from error
        raise ValueError(f"{file} is truncated or damaged ({error}): copy or download it again") from error


def _is_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return dtype and shape of every tensor in the safetensors files of ``folder``; reads headers only.

    Raises ValueError as `tensor_files` does, for a damaged file, and if the index and the files do not agree.
    """
    files, headers = tensor_files(folder), dict[str, TensorHeader]()
    for file in sorted({*files.values()}):
        with open_tensors(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is not a dict
            in_file = {name: TensorHeader(x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
        named = {name for name, place in files.items() if place == file}
        if differing := sorted(named ^ in_file.keys()):
            raise ValueError(
                f"{file} and {_INDEX} do not agree on {differing[0]}, so they are not from the same save: "
                "copy or download the model again"
            )
        headers |= in_file
    return headers


def fingerprint(folder: Path, cache: str | None = None) -> str:
    """Return the fingerprint by which saved files identify a model: two digests of 16 hex digits, joined by a hyphen.

    The first is version 0.1's digest, of parts of each tensor (see `same_model`).  The second is computed from
    config.json and all bytes of the weights.  With a folder ``cache``, which remembers digests, only the first call
    reads all weights (see `sha256_of_files`).  Raises ValueError as `tensor_files` does.
    """
    config, files = (folder / "config.json").read_bytes(), sorted({*tensor_files(folder).values()})
    digests = sha256_of_files(files, Path(cache).expanduser() if cache else None)
    whole = hashlib.sha256(config + "".join(digests).encode()).hexdigest()
    return f"{_sampled_digest(config, files)}-{whole[:16]}"


def _sampled_digest(config: bytes, files: Iterable[Path]) -> str:
    """Return version 0.1's digest of ``config``, file headers, and 4 KiB at each tensor's start, middle and end."""
    digest = hashlib.sha256(config)
    for file in files:
        with file.open("rb") as weights:
            header = weights.read(int.from_bytes(weights.read(8), "little"))
            digest.update(header)
            begin = weights.tell()
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            for first, end in sorted(tensors):
                for at in (first, (first + end) // 2, max(first, end - _PIECE)):
                    weights.seek(begin + at)
                    digest.update(weights.read(min(_PIECE, end - at)))
    return digest.hexdigest()[:16]


def of_first_version(text: str) -> str:
    """Return ``text`` with each fingerprint shortened to its first digest, as version 0.1 wrote it."""
    return re.sub(r"\b([0-9a-f]{16})-[0-9a-f]{16}\b", r"\1", text)


def same_model(saved: object, current: object) -> bool:
    """Return True if two values are equal; in texts, fingerprints that name the same model count as equal.

    A fingerprint that version 0.1 wrote has only the first digest; then only the first digests are compared.
    """
    if not (isinstance(saved, str) and isinstance(current, str)):
        return saved == current
    return saved in (current, of_first_version(current)) or current == of_first_version(saved)
