"""A megatron-core model back into a Hugging Face folder, which transformers, and `weights.load`, can read."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from longctx.hf.config import shape_of
from longctx.hf.scratch import write_folder_like
from longctx.megatron.hf_io.load import of_each_stage
from longctx.megatron.hf_io.names import EMBEDDING, TensorView, tensor_views
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, DistComm
from longctx.shapes import Tensor


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
    """Write ``model``, of ``shape``, to ``folder``: safetensors, config.json, and ``source``'s tokenizer files.

    Every rank calls this, with a model that is the whole or a pipeline stage; of data-parallel replicas the first
    is written.  The folder is there, whole, when the first rank returns, and until then nothing is.  Files hold at
    most ``file_size`` (a larger tensor has one to itself), and that much is gathered at a time.  The configuration
    is ``source``'s, but for the dtype and the fields ``changed`` (see `write_folder_like`).

    Raises ValueError if ``folder`` is there already, or if that configuration is not of a model of ``shape``.
    """
    groups = model.pg_collection
    replicas = getattr(groups, "dp_cp", None)
    if replicas is not None and replicas.rank():
        return
    tp, stages = DistComm(groups.tp), groups.pp
    first = tp.rank == 0 and stages.rank() == 0
    coming = folder.with_name(folder.name + ".coming")
    if first and folder.exists():
        raise ValueError(f"{folder} is there already: give a folder that is not, or move it away")
    if first:
        shutil.rmtree(coming, ignore_errors=True)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        write_folder_like(source, {"dtype": dtype, **(changed or {})}, coming)
        _refuse_other_shape(coming, shape)
    files = _files(model, shape, file_size)
    counts = of_each_stage(len(files), stages)  # and nobody writes before the folder is there
    before, total = sum(counts[: stages.rank()]), sum(counts)
    where: dict[str, str] = {}
    for i, held in enumerate(files, before + 1):
        name = "model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
        _write(coming / name, held, tp)
        where |= dict.fromkeys((part.name for part in held), name)
    size = sum(_bytes(part) for held in files for part in held)
    maps, sizes = zip(*of_each_stage((where, size), stages), strict=True)  # and all is written
    if first:
        if total > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {k: v for m in maps for k, v in m.items()}}
            (coming / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        coming.rename(folder)


def _refuse_other_shape(folder: Path, shape: ModelShape) -> None:
    written = shape_of(folder)
    if wrong := [x.name for x in fields(shape) if getattr(shape, x.name) != getattr(written, x.name)]:
        raise ValueError(
            f"{folder}/config.json, the source's with what was said to be changed, is not that of the model: "
            f"{', '.join(wrong)} differ; name every field that was changed"
        )


def _files(model: GPTModel, shape: ModelShape, size: str) -> list[list[TensorView]]:
    """What goes into each file of this stage.  The first stage's copy of a tied embedding is the one written."""
    held = {part.name: part for part in tensor_views(model, shape) if model.pre_process or part.name != EMBEDDING}
    plan = split_state_dict_into_shards_factory(
        held, get_storage_size=_bytes, filename_pattern="{suffix}", max_shard_size=size
    )
    return [[held[name] for name in names] for names in plan.filename_to_tensors.values()]


def _bytes(part: TensorView) -> int:
    return prod(part.whole) * part.view.element_size()


def _write(file: Path, held: list[TensorView], tp: Comm) -> None:
    tensors = {}
    for part in held:
        whole = whole_of(part, tp)
        if tp.rank == 0:
            tensors[part.name] = whole.cpu()
    if tp.rank == 0:
        save_file(tensors, file, metadata={"format": "pt"})


def whole_of(part: TensorView, tp: Comm) -> Tensor:
    """A copy of the tensor as Hugging Face has it: of all ranks, without padding."""
    mine = part.view.flatten(0, 1)
    shares = [mine] if part.sharded is None else tp.all_gather(mine, [tuple(mine.shape)] * tp.size)
    return torch.cat(shares, part.sharded or 0)[: part.whole[0]]
