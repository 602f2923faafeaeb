"""Sessions on disk: saved from any mesh and restored on any other, between two turns."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from longctx.attention.layout import LAYOUTS, shard_balanced
from longctx.checksum import crc32_of_file
from longctx.hf.tensor_file import save_file
from longctx.infer.session import Session
from longctx.infer.session_index import (
    INDEX,
    VERSION,
    SessionIndex,
    file_name,
    first_head_of,
    has_changed,
    has_index,
    is_session_file,
    write_index,
)
from longctx.infer.turn import Conversation
from longctx.shapes import Tensor

_NEW, _OLD = ".coming", ".going"  # endings of the folders beside a session while it is replaced


def save(session: Session, folder: Path, model: str) -> None:
    """Write ``session`` to ``folder``: an index, and a safetensors file for each set of rows and KV heads.

    ``model`` identifies the weights.  Sampling settings are not saved.  All ranks must call this.  The old content of
    ``folder`` is replaced once everything is written.  Folders beside it with the same name and the ending ``.coming``
    or ``.going`` are deleted.
    """
    # 1. A new folder next to the old one.
    engine = session.engine
    new_folder = folder.with_name(folder.name + _NEW)
    if engine.rank == 0 and engine.tp.rank == 0:
        shutil.rmtree(new_folder, ignore_errors=True)
        new_folder.mkdir(parents=True)
    _gather_numbers(session, [0])  # a barrier: the folder exists

    # 2. Every rank's file, and on the first rank the index.
    written = _gather_numbers(session, [engine.ring.rank, kv_heads(session)[0], *_write_rows(session, new_folder)])
    if engine.rank == 0 and engine.tp.rank == 0:
        index: SessionIndex = {
            "version": VERSION,
            "model": model,
            "dtype": str(engine.dtype),
            "tokens": {str(i): sequence.tokens for i, sequence in session.sequences.items()},
            "cached": {str(i): sequence.cached for i, sequence in session.sequences.items()},
            "files": {
                file_name(*rank_and_head): {"size": size, "crc32": crc} for *rank_and_head, size, crc in written if size
            },
        }
        write_index(new_folder, index)
        _replace(folder, new_folder)
    _gather_numbers(session, [0])  # a barrier: the session is saved


def _write_rows(session: Session, folder: Path) -> tuple[int, int]:
    """Write this rank's rows and heads to ``folder`` and return the file's size in bytes and its checksum.

    If several Ulysses ranks cache the same KV head, only the first of them writes it; the others return (0, 0).
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
    file = folder / file_name(engine.ring.rank, kv_heads(session)[0])
    save_file(tensors, file)
    return file.stat().st_size, crc32_of_file(file)


def _replace(folder: Path, new_folder: Path) -> None:
    """Rename ``new_folder`` to ``folder``, and delete the old content only after that."""
    old_folder = folder.with_name(folder.name + _OLD)
    if folder.exists():
        shutil.rmtree(old_folder, ignore_errors=True)
        folder.rename(old_folder)
    # A process that is killed here leaves the old session in old_folder, where `whole_session` finds it.
    new_folder.replace(folder)
    shutil.rmtree(old_folder, ignore_errors=True)


def whole_session(folder: Path) -> Path:
    """Return ``folder``, or the folder beside it to which a killed `save` moved the session of ``folder``."""
    old_folder = folder.with_name(folder.name + _OLD)
    return old_folder if not folder.exists() and (old_folder / INDEX).is_file() else folder


def refuse_place(folder: Path) -> None:
    """Raise ValueError unless ``folder`` is new, empty or a saved session, and its parent folder is writable.

    The same holds for the two folders beside it that `save` deletes: they may be what a killed process left.
    """
    for ending in (_NEW, _OLD):
        beside = folder.with_name(folder.name + ending)
        if beside.is_symlink() or (beside.exists() and not _is_leftover(beside)):
            raise ValueError(
                f"{beside} exists and is not a session, and saving to session.save={folder} would delete it; rename "
                "it, or use another folder"
            )
    if folder.exists() and not (folder.is_dir() and (is_session(folder) or not any(folder.iterdir()))):
        raise ValueError(
            f"session.save={folder} exists and is not a session, or has other files too, and saving would delete it; "
            "use another folder"
        )
    parent = next(parent for parent in folder.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"session.save={folder} cannot be written; use a folder that you may write to")


def is_session(folder: Path) -> bool:
    """Return True if ``folder`` has an index that looks like a session's, and only files of a session."""
    return has_index(folder) and _is_leftover(folder)


def _is_leftover(folder: Path) -> bool:
    """Return True if ``folder`` has only files of a session; the session, and the last file, may be incomplete."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else [""]
    return all(is_session_file(name) or name.startswith(".tmp") for name in names)  # .tmp: safetensors writes there


def load(session: Session, folder: Path, index: SessionIndex) -> None:
    """Add the sequences of ``folder`` to ``session``, sharded over its ranks, whatever mesh saved them.

    ``index`` is the result of `read_index`.  A sequence of ``session`` with the same number is replaced.  All ranks
    must call this.

    Raises ValueError if a file is corrupt or missing, or if ``folder`` now has another session than ``index``; the
    session then has the same sequences as before.
    """
    before, fault = dict(session.sequences), ""
    try:
        for i in index["tokens"]:
            session.sequences[int(i)] = _read_sequence(session, folder, index, i)
    except (OSError, SafetensorError) as error:
        fault = f"is corrupt or incomplete ({error}); start the conversation again"
    # The index has the checksums of all files.  If it is unchanged, all that was read belongs to it.
    if has_changed(folder, index):
        fault = "was replaced while it was read: another process saves to it; load it after that has ended"
    if fault:
        session.sequences = before
        raise ValueError(f"session.load={folder} {fault}")


def _read_sequence(session: Session, folder: Path, index: SessionIndex, i: str) -> Conversation:
    """Read sequence ``i`` from the files of a session, sharded over the ranks of ``session``."""
    engine, cached = session.engine, index["cached"][i]
    sequence = Conversation(engine.cache(cached + 2), sampling=session.sampling.for_answer(int(i)))
    sequence.append_prompt(index["tokens"][i])
    sequence.cache.extend(shard_balanced([cached], LAYOUTS[session.context.layout], session.rows_per_rank))
    heads, positions = kv_heads(session), sequence.cache.layout.positions(engine.ring.rank)
    for layer in range(engine.shape.layers):
        keys_and_values = (_read_rows(folder, index, f"{i}.{layer}.{kind}", i, positions, heads) for kind in "kv")
        sequence.cache.append(layer, *(x.to(engine.device) for x in keys_and_values))
    return sequence


def kv_heads(session: Session) -> range:
    """Return the range of the model's KV heads that this rank caches."""
    engine = session.engine
    per_tp, degree = engine.shape.kv_heads // engine.tp.size, engine.ulysses.size
    first = engine.tp.rank * per_tp + engine.ulysses.rank * per_tp // degree
    return range(first, first + max(1, per_tp // degree))


def _read_rows(folder: Path, index: SessionIndex, name: str, i: str, positions: Tensor, heads: Sequence[int]) -> Tensor:
    """Read one layer's keys or values, [1 rows heads d], of sequence ``i``, from the files of a session.

    ``name`` is the tensor's name in the files: "0.3.k" has the keys of sequence 0 in layer 3.  The result has the KV
    heads ``heads`` and the rows at ``positions``; every file with some of them is read.
    """
    out: Tensor | None = None
    for file in index["files"]:
        begin = first_head_of(file)
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
    """Return the list ``local`` of every rank; all ranks must call this, with equally many numbers."""
    engine = session.engine
    numbers = torch.tensor([local], device=engine.device)
    for comm in (engine.tp, engine.context):
        numbers = torch.cat(comm.all_gather(numbers, [tuple(numbers.shape)] * comm.size))
    return numbers.tolist()
