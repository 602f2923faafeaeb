"""Locate the tensors of a Hugging Face folder in its safetensors files, and compute a digest of its weights."""

import hashlib
import json
from pathlib import Path

# Weights that are valid only on tensor-parallel ranks; transformers does not load a file of this name.
ADAPTED = "spd.safetensors"
DROPPED = "dropped."  # prefix, in that file, of tensors for a block that drops a reduction
_PIECE = 4096  # bytes read at each of three places of a tensor


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map each tensor name of ``folder`` to the safetensors file that holds it.

    Raises ValueError if the folder has neither model.safetensors, spd.safetensors nor an index of several files.
    """
    from safetensors import safe_open

    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if (folder / ADAPTED).is_file():
        whole = folder / ADAPTED
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not whole.is_file():
        fix = "convert the model to safetensors first"
        if not any(file.suffix in (".bin", ".pt", ".pth", ".gguf") for file in folder.iterdir()):
            fix = "this model has no weights yet, train it with recipes.pretrain"
        raise ValueError(f"{folder} has no model.safetensors: {fix}")
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that identify a model: a digest of config.json and of samples of every tensor.

    Each tensor contributes 4 KiB at its beginning, middle and end.  Models may differ in a few tensors only, so none is
    skipped; they may be too large to read whole.  Raises ValueError as `tensor_files` does.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(tensor_files(folder).values())):
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
