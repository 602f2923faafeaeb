"""A session on disk: saved by any ranks, restored on any others, mid-conversation."""

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longctx.attention.layout import LAYOUTS, shard_balanced
from longctx.infer.session import Conversation, Session
from longctx.shapes import Tensor

_VERSION = 2
_INDEX = "session.json"
_PIECE = 2**20  # bytes


def save(session: Session, folder: Path, model: str) -> None:
    """Write ``session`` to ``folder``: an index, and a safetensors file of each rank's rows and heads.

    ``model`` identifies the weights.  Every rank calls this; what was in ``folder`` before is replaced only when
    all is written.
    """
    engine = session.engine
    coming = folder.with_name(folder.name + ".coming")
    if engine.rank == 0 and engine.tp.rank == 0:
        shutil.rmtree(coming, ignore_errors=True)
        coming.mkdir(parents=True)
    _all_ranks(session, [0])
    written = _all_ranks(session, [engine.ring.rank, kv_heads(session)[0], *_write_rows(session, coming)])
    if engine.rank == 0 and engine.tp.rank == 0:
        index = {
            "version": _VERSION,
            "model": model,
            "dtype": str(next(engine.model.parameters()).dtype),
            "tokens": {i: one.tokens for i, one in session.sequences.items()},
            "cached": {i: one.cached for i, one in session.sequences.items()},
            "files": {_name(*of): {"size": size, "crc32": crc} for *of, size, crc in written if size},
        }
        (coming / _INDEX).write_text(json.dumps(index))
        _replace(folder, coming)
    _all_ranks(session, [0])


def _write_rows(session: Session, folder: Path) -> tuple[int, int]:
    """Write this rank's rows and heads to ``folder``; the bytes of the file and their checksum.

    Of members that cache the same KV head the first one writes; the others have no bytes.
    """
    engine = session.engine
    if engine.ulysses.rank % max(1, engine.ulysses.size * engine.tp.size // engine.shape.kv_heads):
        return 0, 0
    tensors = {}
    for i, one in session.sequences.items():
        tensors[f"{i}.positions"] = one.cache.layout.positions(engine.ring.rank)
        for layer in range(engine.shape.layers):
            keys, values = one.cache.layer(layer)
            tensors |= {f"{i}.{layer}.k": keys[0].contiguous(), f"{i}.{layer}.v": values[0].contiguous()}
    file = folder / _name(engine.ring.rank, kv_heads(session)[0])
    save_file(tensors, file)
    return file.stat().st_size, _checksum(file)


def _name(ring_rank: int, first_head: int) -> str:
    return f"ring{ring_rank}-heads{first_head}.safetensors"


def _checksum(file: Path) -> int:
    """CRC-32 of a file, read a piece at a time.

    It is there against accidents: it tells of a flipped byte for sure, of any other change but for one in four
    billion, and is faster than disks are.  Whoever would forge a file could write the index as well.
    """
    crc = 0
    with file.open("rb") as pieces:
        while piece := pieces.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _replace(folder: Path, coming: Path) -> None:
    going = folder.with_name(folder.name + ".going")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        folder.rename(going)
    coming.replace(folder)
    shutil.rmtree(going, ignore_errors=True)


def refuse_place(folder: Path) -> None:
    """ValueError unless a session can be saved to ``folder``: a new one, an empty one, or one that has a session."""
    if folder.exists() and not (folder.is_dir() and ((folder / _INDEX).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"session.save={folder} is there and is no session, and would be lost: give another folder")
    near = next(parent for parent in folder.parents if parent.exists())
    if not (near.is_dir() and os.access(near, os.W_OK)):
        raise ValueError(f"session.save={folder} cannot be written: give a folder of yours")


def read_index(folder: Path, model: str, dtype: str) -> dict[str, Any]:
    """The index of the session in ``folder``.

    Raises ValueError, saying what to do, if there is none, if a file of it is not as it was written, or if it is
    of another model or dtype.
    """
    try:
        index = json.loads((folder / _INDEX).read_text())
        version, of, kept_as, files = (index[name] for name in ("version", "model", "dtype", "files"))
    except FileNotFoundError as error:
        raise ValueError(f"session.load={folder} holds no session: give a folder that session.save wrote") from error
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"session.load={folder}: {_INDEX} is torn ({error}): save the session again") from error
    if version != _VERSION:
        raise ValueError(f"session.load={folder} is of version {version}, this is {_VERSION}: save the session again")
    if of != model:
        raise ValueError(f"session.load={folder} is of another model ({of}, not {model}): use the one it was made with")
    if kept_as != dtype:
        raise ValueError(f"session.load={folder} is in {kept_as}, not {dtype}: set model.dtype to that")
    for name, kept in files.items():
        if fault := _fault(folder / name, **kept):
            raise ValueError(f"session.load={folder}: {name} {fault}: save the session again")
    return index


def _fault(file: Path, size: int, crc32: int) -> str:
    """What is wrong with a file that had so many bytes and that checksum; nothing if it still has."""
    if not file.is_file() or file.stat().st_size != size:
        return "is missing or torn"
    return "" if _checksum(file) == crc32 else "has changed since it was saved"


def load(session: Session, folder: Path, index: dict[str, Any]) -> None:
    """Fill ``session`` with what ``folder`` holds, sharded over its ranks, however many there were before."""
    engine = session.engine
    heads, rank = kv_heads(session), engine.ring.rank
    try:
        for i, tokens in index["tokens"].items():
            cached = index["cached"][i]
            one = Conversation(session.cache_for(cached, 2), list(tokens))
            one.cache.extend(shard_balanced([cached], LAYOUTS[session.context.layout], session.rows_per_rank))
            positions = one.cache.layout.positions(rank)
            for layer in range(engine.shape.layers):
                kinds = (_rows(folder, index, f"{i}.{layer}.{kind}", i, positions, heads) for kind in "kv")
                one.cache.append(layer, *(x.to(engine.device) for x in kinds))
            session.sequences[int(i)] = one
    except SafetensorError as error:
        raise ValueError(f"session.load={folder} is torn ({error}): save the session again") from error


def kv_heads(session: Session) -> range:
    """The model's KV heads that this rank caches."""
    engine = session.engine
    per_tp, degree = engine.shape.kv_heads // engine.tp.size, engine.ulysses.size
    first = engine.tp.rank * per_tp + engine.ulysses.rank * per_tp // degree
    return range(first, first + max(1, per_tp // degree))


def _rows(folder: Path, index: dict[str, Any], name: str, i: str, positions: Tensor, heads: Sequence[int]) -> Tensor:
    """Keys or values [1 rows heads d] at ``positions``, from whichever files have them."""
    out: Tensor | None = None
    for file in index["files"]:
        begin = int(file.partition("heads")[2].partition(".")[0])
        with safe_open(folder / file, "pt") as tensors:
            there = tensors.get_tensor(f"{i}.positions")
            kept = tensors.get_slice(name)
            shape = kept.get_shape()
            common = [head for head in heads if begin <= head < begin + shape[1]]
            if not common:
                continue
            held = kept[:, common[0] - begin : common[-1] + 1 - begin]
        if out is None:
            out = held.new_empty(1, len(positions), len(heads), shape[2])
        found = torch.isin(positions, there)
        order = there.argsort()
        rows = order[torch.searchsorted(there[order], positions[found])]
        out[0, found.nonzero().flatten(), common[0] - heads[0] : common[-1] + 1 - heads[0]] = held[rows]
    assert out is not None, "no file has these heads"
    return out


def _all_ranks(session: Session, mine: list[int]) -> list[list[int]]:
    """Every rank's ``mine``, of as many numbers each, once all ranks have come to this line."""
    engine = session.engine
    numbers = torch.tensor([mine], device=engine.device)
    for comm in (engine.tp, engine.context):
        numbers = torch.cat(comm.all_gather(numbers, [tuple(numbers.shape)] * comm.size))
    return numbers.tolist()
