"""Hugging Face weights into a megatron-core model, each rank taking its part; see `names` for which is which."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from longctx.hf.checkpoint import DROPPED, tensor_files
from longctx.megatron.hf_io.names import TensorView, tensor_views
from longctx.model_shape import ModelShape
from longctx.shapes import Tensor


@runtime_checkable
class Tensors(Protocol):
    """Hugging Face tensors by name; ``taken`` are the names that were asked for."""

    taken: set[str]

    def __call__(self, name: str) -> Tensor: ...

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """ValueError if a tensor that is there was not taken, here or ``elsewhere``."""
        ...


class Weights:
    """The tensors of a safetensors folder, in one file or many, read by name; ``taken`` are those that were.

    Of the blocks ``dropped``, those that were made for that (`recipes.spd_adapt`), where there are such.
    """

    def __init__(self, folder: Path, dropped: Iterable[int] = ()) -> None:
        self._folder, self._files = folder, tensor_files(folder)
        self._dropped = tuple(f"model.layers.{block}." for block in dropped)
        self.taken: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        if name.startswith(self._dropped) and DROPPED + name in self._files:
            name = DROPPED + name
        if name not in self._files:
            raise ValueError(f"{self._folder} has no tensor {name}, which the model's config.json promises")
        self.taken.add(name)
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: use an unquantised checkpoint")
        return tensor

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """ValueError if a tensor was not taken, here or ``elsewhere``; derived ones, and a tied lm_head, may stay."""
        taken = self.taken.union(elsewhere)
        left = {n for n in self._files if not n.endswith("rotary_emb.inv_freq")} - taken
        # Of a block that may be dropped, the folder has weights for either case.
        left -= {n for n in left if n.startswith(DROPPED) or DROPPED + n in taken}
        left -= {"lm_head.weight"} if tied else set()
        if left:
            raise ValueError(f"{self._folder} has tensors that no part of the model takes: {sorted(left)[:3]}")


@torch.no_grad()
def load(model: GPTModel, read: Tensors, shape: ModelShape) -> None:
    """Fill every parameter of ``model``, the whole or a pipeline stage, from Hugging Face tensors.

    Every rank of the model's tensor and pipeline groups calls this.  Raises ValueError if a tensor is missing, is
    quantised, has another shape than the model's, or is taken by no stage: a model that lacks a part would run,
    and be wrong.
    """
    fill(tensor_views(model, shape), read, model.pg_collection.tp.rank())
    read.refuse_unread(shape.tied, set().union(*of_each_stage(read.taken, model.pg_collection.pp)))


@torch.no_grad()
def fill(held: Iterable[TensorView], read: Callable[[str], Tensor], rank: int) -> None:
    """Copy tensor-parallel rank ``rank``'s share of each tensor into its place.  ValueError for another shape."""
    for part in held:
        whole = read(part.name)
        if tuple(whole.shape) != part.whole:
            raise ValueError(f"{part.name}: the file has {tuple(whole.shape)}, the model {part.whole}")
        part.view.copy_(_share(whole, part, rank).reshape(part.view.shape))


def _share(whole: Tensor, part: TensorView, rank: int) -> Tensor:
    """Tensor-parallel rank ``rank``'s share of ``whole``, zeros where it is padded."""
    if part.sharded is None:
        return whole
    groups, rows, *rest = part.view.shape
    length = (groups * rows, *rest)[part.sharded]
    _, share, _ = whole.tensor_split([rank * length, (rank + 1) * length], part.sharded)
    missing = length - share.shape[part.sharded]
    # Only the vocabulary's rows are padded.
    return torch.cat([share, share.new_zeros(missing, *rest)]) if missing else share


def of_each_stage(value: Any, stages: dist.ProcessGroup) -> list[Any]:
    """Every pipeline stage's ``value``; nobody has them before all have come."""
    of_each: list[Any] = [None] * stages.size()
    dist.all_gather_object(of_each, value, group=stages)
    return of_each
