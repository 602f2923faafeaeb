"""The index of a saved session, checked against the session's files and the model before anything is loaded."""

import json
import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open

from longctx.checksum import KEY, crc32_of_file, has_valid_checksum, with_checksum
from longctx.hf.checkpoint import same_model
from longctx.model_shape import ModelShape
from longctx.shapes import Tensor
from longctx.text_file import write_text

VERSION = 2
INDEX = "session.json"
_FILE_NAME = re.compile(r"ring(\d+)-heads(\d+)\.safetensors", re.ASCII)


class FileState(TypedDict):
    """Size in bytes and CRC-32 of a file when it was written."""

    size: int
    crc32: int


class SessionIndex(TypedDict):
    """Content of a saved session's index.

    ``model`` identifies the weights.  ``tokens`` and ``cached`` map a sequence's number to its token ids and its number
    of cached tokens.  ``files`` has every safetensors file of the folder by name.  ``crc32`` is the checksum of all
    other keys; version 0.1 wrote none.
    """

    version: int
    model: str
    dtype: str
    tokens: dict[str, list[int]]
    cached: dict[str, int]
    files: dict[str, FileState]
    crc32: NotRequired[int]


def file_name(ring_rank: int, first_head: int) -> str:
    """Return the name of the file with the rows of ``ring_rank`` and the KV heads from ``first_head`` on."""
    return f"ring{ring_rank}-heads{first_head}.safetensors"


def is_session_file(name: str) -> bool:
    """Return True if ``name`` is the name of a session's index, or of a file with its rows."""
    return name == INDEX or bool(_FILE_NAME.fullmatch(name))


def first_head_of(name: str) -> int:
    """Return the first KV head of the file ``name``."""
    match = _FILE_NAME.fullmatch(name)
    assert match, f"{name} is not the name of a session's file"
    return int(match[2])


def write_index(folder: Path, index: SessionIndex) -> None:
    """Write ``index``, with its checksum added, to ``folder``."""
    write_text(folder / INDEX, json.dumps(with_checksum(index)))


def read_index(folder: Path, model: str, dtype: str, shape: ModelShape) -> SessionIndex:
    """Read the index of the session in ``folder`` and check the session's files against it.

    ``model`` is the fingerprint of the weights, and ``dtype`` a text such as "torch.float32".

    Raises ValueError if ``folder`` holds no session, if the index or a file is missing or has changed since it was
    written, if the files do not hold every cached token of a model of ``shape``, or if the session is of another
    version, model or dtype.
    """
    index = _parse(folder)
    if not same_model(index["model"], model):
        raise ValueError(
            f"session.load={folder} is of another model ({index['model']}, not {model}); "
            "use the model, dropped blocks and rounded reductions that it was saved with, and the same "
            "model.max_positions, model.rope and model.fp8 settings"
        )
    if index["dtype"] != dtype:
        name = index["dtype"].removeprefix("torch.")
        raise ValueError(f"session.load={folder} is in {index['dtype']}, not {dtype}; set model.dtype={name}")
    fault = _fault_of_tokens(index, shape) or _fault_of_files(folder, index) or _fault_of_rows(folder, index, shape)
    if fault:
        raise ValueError(f"session.load={folder}: {fault}; start the conversation again")
    return index


def has_index(folder: Path) -> bool:
    """Return True if ``folder`` has the index of a session, of any version and model; its content is not checked."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and {"version", "model", "tokens"} <= index.keys()


def has_changed(folder: Path, index: SessionIndex) -> bool:
    """Return True if ``folder`` now has another index than ``index``, or none."""
    try:
        return bool(json.loads((folder / INDEX).read_bytes()) != index)
    except (OSError, ValueError):
        return True


def _parse(folder: Path) -> SessionIndex:
    """Return the index in ``folder``.  Raises ValueError unless it is valid and of this version."""
    try:
        index: Any = json.loads((folder / INDEX).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"session.load={folder} holds no session; use a folder that session.save wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"session.load={folder}: {INDEX} is corrupt ({error}); start the conversation again"
        ) from error
    if isinstance(index, dict) and type(version := index.get("version")) is int and version != VERSION:
        raise ValueError(
            f"session.load={folder} is of version {version}, but this code reads version {VERSION}; "
            "resume it with the code that saved it"
        )
    if not (isinstance(index, dict) and _is_index(index) and (KEY not in index or has_valid_checksum(index))):
        raise ValueError(f"session.load={folder}: {INDEX} has changed since it was saved; start the conversation again")
    return cast(SessionIndex, index)


def _is_index(index: dict[str, Any]) -> bool:
    """Return True if ``index`` has the keys of a `SessionIndex`, and values of their types."""
    if set(index) - {KEY} != set(SessionIndex.__annotations__) - {KEY}:
        return False
    tokens, cached, files = index["tokens"], index["cached"], index["files"]
    if not all(isinstance(value, dict) for value in (tokens, cached, files)):
        return False
    return (
        index["version"] == VERSION
        and isinstance(index["model"], str)
        and isinstance(index["dtype"], str)
        and list(tokens) == list(cached)
        and all(i.isdecimal() and isinstance(ids, list) for i, ids in tokens.items())
        and all(type(number) is int for numbers in (*tokens.values(), cached.values()) for number in numbers)
        and all(_FILE_NAME.fullmatch(name) and _is_file_state(state) for name, state in files.items())
    )


def _is_file_state(state: Any) -> bool:
    return isinstance(state, dict) and set(state) == {"size", KEY} and all(type(n) is int for n in state.values())


def _fault_of_tokens(index: SessionIndex, shape: ModelShape) -> str:
    for i, ids in index["tokens"].items():
        if wrong := [token for token in ids if not 0 <= token < shape.vocab_size]:
            return f"{INDEX} has the token {wrong[0]}, the model's vocabulary has {shape.vocab_size}"
        if not 0 <= index["cached"][i] <= len(ids):
            return f"{INDEX} has {len(ids)} tokens of sequence {i}, {index['cached'][i]} of them cached"
    return ""


def _fault_of_files(folder: Path, index: SessionIndex) -> str:
    for name, state in index["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != state["size"]:
            return f"{name} is missing or truncated"
        if crc32_of_file(file) != state["crc32"]:
            return f"{name} has changed since it was saved"
    return ""


def _fault_of_rows(folder: Path, index: SessionIndex, shape: ModelShape) -> str:
    """Return a text about the first rows or KV heads that the files of a session lack or have twice.

    It is empty if every cached token in ``index`` has all KV heads of the model's ``shape`` once.
    """
    for i, cached in index["cached"].items():
        heads: dict[int, int] = {}  # number of heads of a file, by its first head
        positions: dict[int, list[Tensor]] = {}  # positions of the rows with these heads
        for name in index["files"]:
            first = first_head_of(name)
            try:
                heads[first], file_positions = _rows_in(folder / name, i, shape)
            except (SafetensorError, ValueError) as error:
                return f"{name} is corrupt ({error})"
            positions.setdefault(first, []).append(file_positions)
        if _covered_heads(heads) != shape.kv_heads:
            return f"the files do not have all KV heads of sequence {i}"
        if not all(torch.equal(torch.cat(each).sort().values, torch.arange(cached)) for each in positions.values()):
            return f"the files do not have the positions 0 to {cached - 1} of sequence {i} once each"
    return ""


def _rows_in(file: Path, i: str, shape: ModelShape) -> tuple[int, Tensor]:
    """Return the number of KV heads in ``file`` and the positions of its rows, for sequence ``i``.

    Raises ValueError if a layer has keys or values of another shape, and SafetensorError if a layer is missing.
    """
    with safe_open(file, "pt") as tensors:
        positions: Tensor = tensors.get_tensor(f"{i}.positions")
        names = [f"{i}.{layer}.{kind}" for layer in range(shape.layers) for kind in "kv"]
        shapes = {tuple(tensors.get_slice(name).get_shape()) for name in names}
    heads = next(iter(shapes))[1]
    if shapes != {(len(positions), heads, shape.head_dim)}:
        raise ValueError(f"keys or values of sequence {i} do not have the model's shape")
    return heads, positions


def _covered_heads(numbers: dict[int, int]) -> int:
    """Return the number of heads, from head 0 on, that the files hold without a gap.

    ``numbers`` maps each file's first head to its number of heads.
    """
    covered = 0
    while numbers.get(covered):
        covered += numbers[covered]
    return covered
