"""The check that a Hugging Face folder holds exactly the tensors of its model."""

from pathlib import Path

import torch

from longctx.hf.checkpoint import (
    ADAPTED,
    DROPPED,
    NORMS_OF_RANKS,
    TensorHeader,
    open_tensors,
    tensor_files,
    tensor_headers,
)
from longctx.hf.config import family_in
from longctx.model_shape import ModelShape
from longctx.models import Family
from longctx.models.tensors import EMBEDDING, HEAD, tensor_shapes

_DTYPES = ("F64", "F32", "F16", "BF16")
_ROTARY = "rotary_emb.inv_freq"  # a buffer that older versions of transformers saved
_ROWS = 8192  # rows of the vocabulary that are compared at once


def stored_shapes(family: Family, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the files of a model of ``family``, by its name there."""
    canonical, stored = tensor_shapes(shape), dict[str, tuple[int, ...]]()
    for whole, parts in family.groups(canonical).items():
        rows, *columns = canonical[parts[0]]
        if interleaved := family.interleaved(whole):
            stored[whole] = (len(parts) // interleaved, *columns, rows * interleaved)
        else:
            stored[whole] = (sum(canonical[part][0] for part in parts), *columns)
    return stored


def refuse_other_tensors(
    folder: Path, shape: ModelShape, *, norm_copies: int = 1, rotary_changed: bool = False
) -> None:
    """Raise ValueError unless the safetensors files of ``folder`` hold exactly the tensors of a model of ``shape``.

    Reads the headers of the files.  Also compares two kinds of tensors that a model derives: lm_head.weight of a tied
    model with the embedding, and stored rotary frequencies with those of config.json.  With ``rotary_changed``, the
    settings replace the frequencies, and stored ones are not compared.

    In an adapted folder, tensors for dropped blocks have the same shapes.  Only their norms may have ``norm_copies``
    weights, one per rank, concatenated.
    """
    # Tensors of dropped blocks have canonical names.
    canonical = tensor_shapes(shape)
    headers, expected = tensor_headers(folder), stored_shapes(family_in(folder), shape)
    derived = {name for name in headers if name.endswith(_ROTARY) or (shape.tied and name == HEAD)}
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} has a PEFT adapter (adapter_config.json), which is not applied: merge it first")
    if missing := [name for name in expected if name not in headers]:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors that its config.json requires, such as {missing[0]}: "
            "use a complete checkpoint"
        )
    dropped = {DROPPED + name for name in canonical} if (folder / ADAPTED).is_file() else set()
    known = expected.keys() | derived | dropped
    if unknown := [name for name in headers if name not in known]:
        raise ValueError(
            f"{folder} has tensors that no part of the model takes: {sorted(unknown)[:3]}; "
            "use a checkpoint of the architecture that its config.json names"
        )
    for name, header in headers.items():
        is_copied = name.startswith(DROPPED) and name.endswith(NORMS_OF_RANKS)
        size = canonical[EMBEDDING] if name == HEAD else expected.get(name) or canonical.get(name.removeprefix(DROPPED))
        _refuse_other_header(folder, name, header, size and (size[0] * (norm_copies if is_copied else 1), *size[1:]))
    if shape.tied and HEAD in headers:
        refuse_other_head(folder)
    if not rotary_changed:
        _refuse_other_frequencies(folder, [name for name in headers if name.endswith(_ROTARY)], shape)


def _refuse_other_header(folder: Path, name: str, header: TensorHeader, size: tuple[int, ...] | None) -> None:
    """Raise ValueError if tensor ``name`` of ``folder`` has a quantised dtype, or another shape than ``size``.

    For ``size`` None, any shape is accepted.
    """
    if header.dtype not in _DTYPES:
        raise ValueError(f"{folder}: {name} is {header.dtype}: use an unquantised checkpoint")
    if size and header.shape != size:
        raise ValueError(
            f"{folder}: {name} has shape {header.shape}, but its config.json requires {size}: "
            "use the config.json that belongs to the checkpoint"
        )


def refuse_other_head(folder: Path) -> None:
    """Raise ValueError if lm_head.weight differs from the embedding of ``folder``, whose config.json ties them.

    transformers does not tie two stored tensors that differ, so ignoring one of them would give other logits.
    """
    files = tensor_files(folder)
    with open_tensors(files[EMBEDDING]) as first, open_tensors(files[HEAD]) as second:
        embedding, head = first.get_slice(EMBEDDING), second.get_slice(HEAD)
        same = embedding.get_shape() == head.get_shape()
        for at in range(0, embedding.get_shape()[0], _ROWS):
            same = same and torch.equal(embedding[at : at + _ROWS].float(), head[at : at + _ROWS].float())
    if not same:
        raise ValueError(
            f"{folder} has an {HEAD} that differs from the embedding, and its config.json says "
            "tie_word_embeddings=true: set it to false to use that tensor, or remove the tensor"
        )


def _refuse_other_frequencies(folder: Path, names: list[str], shape: ModelShape) -> None:
    """Raise ValueError if stored rotary frequencies have another base than those of config.json.

    Older versions of transformers stored the frequencies before linear scaling, so a common factor is accepted.
    """
    files = tensor_files(folder)
    for name in names:
        with open_tensors(files[name]) as file:
            stored = file.get_tensor(name).float()
        if not any(_are_scaled(stored, torch.tensor(each.frequencies)) for each in {*shape.rotaries} if each):
            raise ValueError(
                f"{folder}: the rotary frequencies in {name} are not those of its config.json: correct rope_theta "
                "there, or remove the tensor"
            )


def _are_scaled(stored: torch.Tensor, frequencies: torch.Tensor) -> bool:
    """Return True if ``stored`` are ``frequencies`` times a factor of 1 or more, to the precision of 16-bit numbers."""
    if stored.shape != frequencies.shape:
        return False
    factor = stored[0] / frequencies[0]
    return bool(factor > 0.99) and torch.allclose(stored, frequencies * factor, rtol=1e-2, atol=1e-7)
