"""Sessions on disk: saved from any mesh and restored on any other, between two turns."""

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open

from longctx.attention.layout import LAYOUTS, shard_balanced
from longctx.hf.tensor_file import save_file
from longctx.infer.session import Conversation, Session
from longctx.shapes import Tensor

_VERSION = 2
_INDEX = "session.json"
_READ_BYTES = 2**20


class FileState(TypedDict):
    """Bytes and CRC-32 of a file, as written."""

    size: int
    crc32: int


class SessionIndex(TypedDict):
    """Content of a saved session's index.

    ``model`` identifies the weights.  ``tokens`` and ``cached`` have each sequence's token ids and number of cached
    tokens, by its number.  ``files`` has every safetensors file of the folder by name.
    """

    version: int
    model: str
    dtype: str
    tokens: dict[str, list[int]]
    cached: dict[str, int]
    files: dict[str, FileState]


def save(session: Session, folder: Path, model: str) -> None:
    """Write ``session`` to ``folder``: an index, and a safetensors file for each set of rows and KV heads.

    ``model`` identifies the weights.  All ranks must call this.  The old content of ``folder`` is replaced once
    everything is written.
    """
    # 1. A new folder beside the old one.
    engine = session.engine
    new_folder = folder.with_name(folder.name + ".coming")
    if engine.rank == 0 and engine.tp.rank == 0:
        shutil.rmtree(new_folder, ignore_errors=True)
        new_folder.mkdir(parents=True)
    _gather_numbers(session, [0])  # a barrier: the folder exists

    # 2. Every rank's file, and on the first rank the index.
    written = _gather_numbers(session, [engine.ring.rank, kv_heads(session)[0], *_write_rows(session, new_folder)])
    if engine.rank == 0 and engine.tp.rank == 0:
        index = {
            "version": _VERSION,
            "model": model,
            "dtype": str(next(engine.model.parameters()).dtype),
            "tokens": {i: sequence.tokens for i, sequence in session.sequences.items()},
            "cached": {i: sequence.cached for i, sequence in session.sequences.items()},
            "files": {
                _file_name(*rank_and_head): {"size": size, "crc32": crc}
                for *rank_and_head, size, crc in written
                if size
            },
        }
        (new_folder / _INDEX).write_text(json.dumps(index))
        _replace(folder, new_folder)
    _gather_numbers(session, [0])  # a barrier: the session is saved


def _write_rows(session: Session, folder: Path) -> tuple[int, int]:
    """Write this rank's rows and heads to ``folder`` and return the file's bytes and checksum.

    If several Ulysses ranks cache the same KV head, only the first writes it; the others return (0, 0).
    """
    engine = session.engine
    if engine.ulysses.rank % max(1, engine.ulysses.size * engine.tp.size // engine.shape.kv_heads):
        return 0, 0
    tensors = {}
    for i, sequence in session.sequences.items():
        tensors[f"{i}.positions"] = sequence.cache.layout.positions(engine.ring.rank)
        for layer in range(engine.shape.layers):
            keys, values = sequence.cache.layer(layer)
            tensors |= {f"{i}.{layer}.k": keys[0].contiguous(), f"{i}.{layer}.v": values[0].contiguous()}
    file = folder / _file_name(engine.ring.rank, kv_heads(session)[0])
    save_file(tensors, file)
    return file.stat().st_size, _checksum(file)


def _file_name(ring_rank: int, first_head: int) -> str:
    return f"ring{ring_rank}-heads{first_head}.safetensors"


def _checksum(file: Path) -> int:
    """Return the CRC-32 of a file.

    It detects accidents: any single flipped byte for certain, other changes with a miss rate of 2^-32.  It runs faster
    than a disk reads.  It does not detect forgery, since a forger can write the index too.
    """
    crc = 0
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def _replace(folder: Path, new_folder: Path) -> None:
    """Rename ``new_folder`` to ``folder``, and delete the old content only after that."""
    old_folder = folder.with_name(folder.name + ".going")
    shutil.rmtree(old_folder, ignore_errors=True)
    if folder.exists():
        folder.rename(old_folder)
    new_folder.replace(folder)
    shutil.rmtree(old_folder, ignore_errors=True)


def refuse_place(folder: Path) -> None:
    """Raise ValueError unless ``folder`` is writable and is new, empty or a saved session."""
    if folder.exists() and not (folder.is_dir() and ((folder / _INDEX).is_file() or not any(folder.iterdir()))):
        raise ValueError(
            f"session.save={folder} exists and is not a session; saving would delete it. Use another folder."
        )
    parent = next(parent for parent in folder.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"session.save={folder} cannot be written; use a folder that you may write to.")


def read_index(folder: Path, model: str, dtype: str) -> SessionIndex:
    """Read the index of the session in ``folder`` and check the session's files against it.

    Raises ValueError if ``folder`` holds no session, if a file is missing or has changed since it was written, or if
    the session is of another version, model or dtype.
    """
    try:
        index: SessionIndex = json.loads((folder / _INDEX).read_text())
        version, saved_model = index["version"], index["model"]
        saved_dtype, files = index["dtype"], index["files"]
    except FileNotFoundError as error:
        raise ValueError(f"session.load={folder} holds no session; use a folder that session.save wrote.") from error
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"session.load={folder}: {_INDEX} is corrupt ({error}); start the conversation again."
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"session.load={folder} is of version {version}, this code reads {_VERSION}; resume it with the code "
            "that saved it."
        )
    if saved_model != model:
        raise ValueError(
            f"session.load={folder} is of another model ({saved_model}, not {model}); use the model it was saved with."
        )
    if saved_dtype != dtype:
        name = saved_dtype.removeprefix("torch.")
        raise ValueError(f"session.load={folder} is in {saved_dtype}, not {dtype}; set model.dtype={name}.")
    for name, written in files.items():
        if fault := _fault(folder / name, **written):
            raise ValueError(f"session.load={folder}: {name} {fault}; start the conversation again.")
    return index


def _fault(file: Path, size: int, crc32: int) -> str:
    """Describe how ``file`` differs from one of ``size`` bytes and checksum ``crc32``; empty if it does not."""
    if not file.is_file() or file.stat().st_size != size:
        return "is missing or truncated"
    return "" if _checksum(file) == crc32 else "has changed since it was saved"


def load(session: Session, folder: Path, index: SessionIndex) -> None:
    """Add the sequences of ``folder`` to ``session``, sharded over its ranks, whatever mesh saved them.

    Raises ValueError if a file cannot be read.
    """
    engine = session.engine
    heads, rank = kv_heads(session), engine.ring.rank
    try:
        for i, tokens in index["tokens"].items():
            cached = index["cached"][i]
            sequence = Conversation(session.cache_for(cached, 2), list(tokens))
            sequence.cache.extend(shard_balanced([cached], LAYOUTS[session.context.layout], session.rows_per_rank))
            positions = sequence.cache.layout.positions(rank)
            for layer in range(engine.shape.layers):
                keys_and_values = (
                    _read_rows(folder, index, f"{i}.{layer}.{kind}", i, positions, heads) for kind in "kv"
                )
                sequence.cache.append(layer, *(x.to(engine.device) for x in keys_and_values))
            session.sequences[int(i)] = sequence
    except SafetensorError as error:
        raise ValueError(f"session.load={folder} is corrupt ({error}); start the conversation again.") from error


def kv_heads(session: Session) -> range:
    """Return the range of the model's KV heads that this rank caches."""
    engine = session.engine
    per_tp, degree = engine.shape.kv_heads // engine.tp.size, engine.ulysses.size
    first = engine.tp.rank * per_tp + engine.ulysses.rank * per_tp // degree
    return range(first, first + max(1, per_tp // degree))


def _read_rows(folder: Path, index: SessionIndex, name: str, i: str, positions: Tensor, heads: Sequence[int]) -> Tensor:
    """Read keys or values, [1 rows heads d], of sequence ``i`` at ``positions``, from all files that have some."""
    out: Tensor | None = None
    for file in index["files"]:
        begin = int(file.partition("heads")[2].partition(".")[0])
        # 1. The heads that the file and this rank have in common.
        with safe_open(folder / file, "pt") as tensors:
            file_positions = tensors.get_tensor(f"{i}.positions")
            stored = tensors.get_slice(name)
            _, file_heads, head_dim = stored.get_shape()
            common = [head for head in heads if begin <= head < begin + file_heads]
            if not common:
                continue
            file_rows = stored[:, common[0] - begin : common[-1] + 1 - begin]
        if out is None:
            out = file_rows.new_empty(1, len(positions), len(heads), head_dim)

        # 2. Of these, the rows at this rank's positions.
        in_file = torch.isin(positions, file_positions)
        order = file_positions.argsort()
        rows = order[torch.searchsorted(file_positions[order], positions[in_file])]
        out[0, in_file.nonzero().flatten(), common[0] - heads[0] : common[-1] + 1 - heads[0]] = file_rows[rows]
    assert out is not None, "no file has these heads"
    return out


def _gather_numbers(session: Session, local: list[int]) -> list[list[int]]:
    """Return every rank's ``local`` numbers; all ranks pass equally many.  Also a barrier for all ranks."""
    engine = session.engine
    numbers = torch.tensor([local], device=engine.device)
    for comm in (engine.tp, engine.context):
        numbers = torch.cat(comm.all_gather(numbers, [tuple(numbers.shape)] * comm.size))
    return numbers.tolist()
