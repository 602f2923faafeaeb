"""Save a megatron-core model as a Hugging Face folder, which transformers and `load.Weights` can read."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from megatron.core.models.gpt import GPTModel

from longctx.hf.config import family_in, shape_of
from longctx.hf.scratch import write_folder_like
from longctx.hf.tensor_file import save_file
from longctx.megatron.hf_io.load import gather_values
from longctx.megatron.hf_io.names import TensorView, tensor_views
from longctx.megatron.hf_io.stored import join
from longctx.model_shape import ModelShape
from longctx.models import Family
from longctx.models.tensors import EMBEDDING
from longctx.parallel.comm import Comm
from longctx.parallel.dist_comm import DistComm
from longctx.shapes import Float, Tensor
from longctx.text_file import write_text

StoredTensors = dict[str, list[TensorView]]  # tensors of the files, each with the views that it concatenates


@torch.no_grad()
def save(
    model: GPTModel,
    shape: ModelShape,
    folder: Path,
    source: Path,
    *,
    changed: Mapping[str, Any] | None = None,
    file_size: str = "5GB",
) -> None:
    """Write ``model`` of ``shape`` to ``folder``: safetensors, config.json, and the tokenizer files of ``source``.

    Every rank calls this with its part: the whole model, a pipeline stage, or a share of the tensors or experts.  Only
    the first data-parallel replica is written.  The first rank moves the complete folder into place by a rename, then
    returns.  Other ranks may return before the folder exists.

    A file holds at most ``file_size``, except that a larger tensor has a file to itself.  At most one file's tensors
    are gathered at a time.  config.json is that of ``source`` with the model's dtype and the fields in ``changed`` (see
    `write_folder_like`).

    Raises ValueError if ``folder`` exists, or if the resulting config.json does not describe a model of ``shape``.
    """
    groups = model.pg_collection
    if groups.expt_dp.rank():  # another rank has the same experts, and the same other weights
        return
    tp, ep, stages = DistComm(groups.tp), DistComm(groups.ep), groups.pp
    first = tp.rank == ep.rank == stages.rank() == 0
    partial_folder = folder.with_name(folder.name + ".coming")

    # 1. The first rank writes the configuration and the tokenizer, and checks them against the model.
    if first and folder.exists():
        raise ValueError(f"{folder} already exists; choose another folder, or move it away")
    if first:
        shutil.rmtree(partial_folder, ignore_errors=True)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        write_folder_like(source, {"dtype": dtype, **(changed or {})}, partial_folder)
        _refuse_other_shape(partial_folder, shape)

    # 2. Every stage writes its files.  The exchange of counts is also a barrier: the folder exists after it.
    family = family_in(source)
    files = _files_of_stage(model, shape, family, file_size)
    counts = gather_values(len(files), stages)
    before, total = sum(counts[: stages.rank()]), sum(counts)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(files, before + 1):
        name = "model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
        _write(partial_folder / name, tensors, family, tp, ep)
        weight_map |= dict.fromkeys(tensors, name)
    size = sum(_bytes(parts) for tensors in files for parts in tensors.values())

    # 3. After this barrier all files are written; the first rank adds the index and moves the folder into place.
    maps, sizes = zip(*gather_values((weight_map, size), stages), strict=True)
    if first and total > 1:
        _write_index(partial_folder, maps, sum(sizes))
    if first:
        partial_folder.rename(folder)


def _write_index(folder: Path, maps: Sequence[Mapping[str, str]], size: int) -> None:
    """Write the index of several files, from each stage's map of tensors to files; ``size`` is in bytes."""
    index = {"metadata": {"total_size": size}, "weight_map": {name: file for one in maps for name, file in one.items()}}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _refuse_other_shape(folder: Path, shape: ModelShape) -> None:
    """Raise ValueError if the config.json that `save` has just written to ``folder`` does not describe ``shape``."""
    written = shape_of(folder)
    if wrong := [x.name for x in fields(shape) if getattr(shape, x.name) != getattr(written, x.name)]:
        raise ValueError(
            "the source's config.json, with the fields in `changed`, does not describe the model to be saved: "
            f"{', '.join(wrong)} differ; pass in `changed` every field of config.json that determines them"
        )


def _files_of_stage(model: GPTModel, shape: ModelShape, family: Family, file_size: str) -> list[StoredTensors]:
    """Return, for each file of this pipeline stage, its tensors by name; a file has at most ``file_size``.

    A tied embedding is written by the first stage and skipped by the last.
    """
    stored: StoredTensors = {}
    for view in _views_on_all_ranks(model, shape):
        if model.pre_process or view.name != EMBEDDING:
            stored.setdefault(family.stored(view.name), []).append(view)
    plan = split_state_dict_into_shards_factory(
        stored, get_storage_size=_bytes, filename_pattern="{suffix}", max_shard_size=file_size
    )
    return [{name: stored[name] for name in names} for names in plan.filename_to_tensors.values()]


def _bytes(parts: Sequence[TensorView]) -> int:
    """Return the size in bytes of one tensor of a file: the whole tensors of ``parts``, joined."""
    return sum(prod(part.full_shape) * part.view.element_size() for part in parts)


def _views_on_all_ranks(model: GPTModel, shape: ModelShape) -> Iterator[TensorView]:
    """Yield a view for every tensor of this pipeline stage, those of other ranks' experts included, in model order.

    Expert-parallel ranks hold different experts of the same shapes.  For an expert on another rank, the view is that of
    this rank's expert in the same place, with the other expert's name and ``ep_rank`` set to its rank.
    """
    by_rank = [tensor_views(model, shape, rank) for rank in range(model.pg_collection.ep.size())]
    for is_shared, run in groupby(zip(*by_rank, strict=True), lambda views: views[0].name == views[-1].name):
        if is_shared:
            yield from (views[0] for views in run)
        else:
            for rank, views in enumerate(zip(*run, strict=True)):
                yield from (replace(view, ep_rank=rank) for view in views)


def _write(file: Path, stored: StoredTensors, family: Family, tp: Comm, ep: Comm) -> None:
    """Gather the tensors of one file from the ranks of ``tp`` and ``ep``, and write them to ``file`` on the first rank.

    ``stored`` maps a name in the file to the views that make up its tensor.
    """
    tensors = {}
    for name, parts in stored.items():
        tensor = join([_gather_expert(part, tp, ep) for part in parts], family.interleaved(name))
        if tp.rank == ep.rank == 0:
            tensors[name] = tensor.cpu()
    if tp.rank == ep.rank == 0:
        save_file(tensors, file, metadata={"format": "pt"})


def _gather_expert(view: TensorView, tp: Comm, ep: Comm) -> Float[Tensor, "rows ..."]:
    """Return the whole tensor of ``view`` on every rank; an expert's comes from the rank of ``ep`` that holds it."""
    whole = gather_whole(view, tp)
    return whole if view.ep_rank is None else ep.all_gather(whole, [tuple(whole.shape)] * ep.size)[view.ep_rank]


def gather_whole(view: TensorView, tp: Comm) -> Float[Tensor, "rows ..."]:
    """Return a copy of the whole Hugging Face tensor, without padding, on every rank of ``tp``."""
    local = view.view.flatten(0, 1)
    shards = [local] if view.shard_dim is None else tp.all_gather(local, [tuple(local.shape)] * tp.size)
    return torch.cat(shards, view.shard_dim or 0)[: view.full_shape[0]]
