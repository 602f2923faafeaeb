"""The weights of a folder: which file holds each tensor, and a digest that tells models apart."""

import hashlib
import json
from pathlib import Path

# Weights that are right on tensor-parallel ranks alone: by another name, so that transformers does not load them.
ADAPTED = "spd.safetensors"
DROPPED = "dropped."  # what a tensor's name begins with there if it is for a block that drops a reduction
_PIECE = 4096  # bytes of a tensor that are looked at


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors folder, which has one, or several and an index; else ValueError."""
    from safetensors import safe_open

    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if (folder / ADAPTED).is_file():
        whole = folder / ADAPTED
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not whole.is_file():
        what_to_do = "convert the model to safetensors first"
        if not any(file.suffix in (".bin", ".pt", ".pth", ".gguf") for file in folder.iterdir()):
            what_to_do = "this model has no weights yet, train it with recipes.pretrain"
        raise ValueError(f"{folder} has no model.safetensors: {what_to_do}")
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def fingerprint(folder: Path) -> str:
    """What tells one model's weights from another's: a digest of the configuration and of a piece of every tensor.

    Of each tensor its beginning, middle and end: models may share all but some of them, and be far too large to read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(tensor_files(folder).values())):
        with file.open("rb") as weights:
            header = weights.read(int.from_bytes(weights.read(8), "little"))
            digest.update(header)
            begin = weights.tell()
            tensors = [one["data_offsets"] for name, one in json.loads(header).items() if name != "__metadata__"]
            for first, end in sorted(tensors):
                for at in (first, (first + end) // 2, max(first, end - _PIECE)):
                    weights.seek(begin + at)
                    digest.update(weights.read(min(_PIECE, end - at)))
    return digest.hexdigest()[:16]
