"""Write an adapted model folder: every original tensor, and the repaired tensors of blocks that may drop."""

import json
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from longctx.checksum import KEY
from longctx.hf.checkpoint import ADAPTED, DROPPED, NORMS_OF_RANKS, tensor_files
from longctx.hf.scratch import copied_files, write_folder_like
from longctx.hf.tensor_file import save_file
from longctx.shapes import Tensor
from longctx.spd.plan import SavedPlan


def write_block(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a block's ``tensors`` and ``metadata`` to the safetensors ``file``, which appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".coming")
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(saved, partial, metadata={**metadata, KEY: _crc32_of(saved, metadata)})
    partial.replace(file)


def read_block(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that `write_block` wrote to ``file``.

    Raises ValueError if the file has changed since.  Version 0.1 wrote no checksum; such a file is not checked.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
            metadata = dict(opened.metadata() or {})
        changed = KEY in metadata and metadata.pop(KEY) != _crc32_of(tensors, metadata)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}): remove it; the same command then makes it again") from error
    if changed:
        raise ValueError(f"{file} has changed since it was written: remove it; the same command then makes it again")
    return tensors, metadata


def _crc32_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of contiguous ``tensors`` on the CPU and of ``metadata``, as text."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


def assemble(source: Path, files: Iterable[Path], saved: SavedPlan, to: Path) -> None:
    """Write the model of ``source``, the repaired blocks in ``files`` and their plan ``saved`` to the folder ``to``.

    ``files`` are those of `write_block`.  The folder ``to`` must exist; a model in it is replaced.  transformers does
    not find the folder's weights, which are in a file of another name (`ADAPTED`).  With no block dropped they equal
    the source's; with dropped blocks transformers could not use them.
    """
    # 1) Original tensors under their own names.
    tensors = {}
    for name, file in tensor_files(source).items():
        with safe_open(file, "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    # 2) Tensors of dropped blocks.  With norms per rank, every block gets a copy per rank, so that any block may drop.
    if saved.plan.own_norms:
        norms = [f"model.layers.{block}.{norm}" for block in range(saved.plan.layers) for norm in NORMS_OF_RANKS]
        tensors |= {DROPPED + name: tensors[name].repeat(saved.plan.tp) for name in norms}
    for file in files:
        tensors |= {DROPPED + name: tensor for name, tensor in read_block(file)[0].items()}
    # 3) Build the folder aside, then move its files.  config.json, which makes a folder a model, moves last.
    with tempfile.TemporaryDirectory(dir=to, prefix=".coming-") as work:
        folder = Path(work, "model")
        write_folder_like(source, {}, folder)
        save_file(tensors, folder / ADAPTED, metadata={"format": "pt"})
        saved.write(folder)
        for file in (to / "config.json", *copied_files(to)):  # the new model may lack some of them
            file.unlink(missing_ok=True)
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            moved = to / file.relative_to(folder)
            moved.parent.mkdir(exist_ok=True)
            file.replace(moved)
