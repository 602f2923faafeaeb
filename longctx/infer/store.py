"""A session on disk: saved by any ranks, restored on any others, mid-conversation."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longctx.attention.layout import LAYOUTS, deal
from longctx.infer.session import Conversation, Session, meet
from longctx.shapes import Tensor

_VERSION = 1
_INDEX = "session.json"


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
    _meet(session)
    name = f"ring{engine.ring.rank}-heads{kv_heads(session)[0]}.safetensors"
    tensors = {}
    for i, one in session.sequences.items():
        tensors[f"{i}.positions"] = one.cache.layout.positions(engine.ring.rank)
        for layer in range(engine.shape.layers):
            keys, values = one.cache.layer(layer)
            tensors |= {f"{i}.{layer}.k": keys[0].contiguous(), f"{i}.{layer}.v": values[0].contiguous()}
    # Of members that share a KV head the last to come replaces the others' file by the same.
    part = coming / f"{name}.{engine.rank}"
    save_file(tensors, part)
    part.replace(coming / name)
    _meet(session)
    if engine.rank == 0 and engine.tp.rank == 0:
        index = {
            "version": _VERSION,
            "model": model,
            "dtype": str(next(engine.model.parameters()).dtype),
            "tokens": {i: one.tokens for i, one in session.sequences.items()},
            "cached": {i: one.cached for i, one in session.sequences.items()},
            "files": {file.name: file.stat().st_size for file in sorted(coming.glob("*.safetensors"))},
        }
        (coming / _INDEX).write_text(json.dumps(index))
        _replace(folder, coming)
    _meet(session)


def _replace(folder: Path, coming: Path) -> None:
    going = folder.with_name(folder.name + ".going")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        folder.rename(going)
    coming.replace(folder)
    shutil.rmtree(going, ignore_errors=True)


def read_index(folder: Path, model: str, dtype: str) -> dict[str, Any]:
    """The index of the session in ``folder``.

    Raises ValueError, saying what to do, if there is none, if it is torn, or of another model or dtype.
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
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(f"session.load={folder}: {name} is missing or torn: save the session again")
    return index


def load(session: Session, folder: Path, index: dict[str, Any]) -> None:
    """Fill ``session`` with what ``folder`` holds, sharded over its ranks, however many there were before."""
    engine = session.engine
    heads, rank = kv_heads(session), engine.ring.rank
    try:
        for i, tokens in index["tokens"].items():
            cached = index["cached"][i]
            one = Conversation(engine.cache(cached + 2), list(tokens))
            one.cache.extend(deal([cached], LAYOUTS[session.context.layout], session.held))
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


def _meet(session: Session) -> None:
    meet(session.engine)
    session.engine.tp.all_gather(torch.zeros(1), [(1,)] * session.engine.tp.size)
