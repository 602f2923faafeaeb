"""Load Hugging Face weights into a megatron-core model; each rank copies its shard.  `names` maps the tensors."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from longctx.hf.checkpoint import DROPPED, tensor_files
from longctx.hf.config import family_in, shape_of
from longctx.hf.tensors import refuse_other_head
from longctx.megatron.hf_io.names import TensorView, tensor_views
from longctx.megatron.hf_io.stored import part_of_expert
from longctx.model_shape import ModelShape
from longctx.models.tensors import HEAD, tensor_shapes
from longctx.shapes import Float, Tensor

Value = TypeVar("Value")


@runtime_checkable
class TensorSource(Protocol):
    """Hugging Face tensors, each returned by a call with its canonical name.

    ``read_names`` has the tensors read so far, by their names in the source.
    """

    read_names: set[str]

    def __call__(self, name: str) -> Tensor: ...

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """Raise ValueError if a tensor was read neither here (``read_names``) nor ``elsewhere``.

        ``elsewhere`` has the ``read_names`` of other pipeline stages and expert-parallel ranks.  The lm_head.weight of
        a ``tied`` model may stay unread if it equals the embedding.  A source may allow other tensors to stay unread:
        see `Weights`.
        """
        ...


class Weights:
    """The tensors of a safetensors folder (one file, or several with an index), read by their canonical names.

    For a block in ``dropped``, tensors adapted to a dropped reduction are read if the folder has them, otherwise the
    original ones.  recipes.spd_adapt writes the adapted tensors under "dropped." + name.
    ``read_names`` are the names in the files that were read so far.
    """

    def __init__(self, folder: Path, dropped: Iterable[int] = ()) -> None:
        self._folder, self._files = folder, tensor_files(folder)
        self._family, self._shapes = family_in(folder), tensor_shapes(shape_of(folder))
        self._parts = self._family.groups(self._shapes)
        self._dropped = tuple(f"model.layers.{block}." for block in dropped)
        self.read_names: set[str] = set()

    def __call__(self, name: str) -> Float[Tensor, "..."]:
        """Return the tensor of the canonical ``name``; for a dropped block, the adapted one if the folder has it.

        Raises ValueError if the tensor is missing, quantised, or stored with another number of rows.
        """
        if name.startswith(self._dropped) and DROPPED + name in self._files:
            return self._read(DROPPED + name)
        stored = self._family.stored(name)
        parts = self._parts.get(stored, [name])
        if interleaved := self._family.interleaved(stored):
            expert, index = divmod(parts.index(name), interleaved)
            return part_of_expert(self._read(stored, expert), index, interleaved)
        if len(parts) == 1:
            return self._read(stored)
        whole, rows = self._read(stored), [self._shapes[part][0] for part in parts]
        if len(whole) != sum(rows):
            raise ValueError(
                f"{stored}: the checkpoint has {len(whole)} rows, the model {sum(rows)}; "
                "use the config.json that belongs to the checkpoint"
            )
        part: Tensor = whole.split(rows)[parts.index(name)]
        return part

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        """Return the tensor ``name`` of the files, or its entry ``expert`` along dim 0."""
        if name not in self._files:
            raise ValueError(
                f"{self._folder} has no tensor {name}, which the model's config.json requires; "
                "use a complete checkpoint"
            )
        self.read_names.add(name)
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name) if expert is None else file.get_slice(name)[expert]
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: use an unquantised checkpoint")
        return tensor

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """Raise ValueError if a tensor was read neither here nor ``elsewhere`` (the ``read_names`` of other ranks).

        Three kinds of tensors may stay unread.

        * Rotary frequencies, since they are derived.
        * The lm_head.weight of a ``tied`` model, if it equals the embedding.
        * One of the two sets of weights of a block that may drop its reduction.
        """
        read = self.read_names.union(elsewhere)
        unread = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")} - read
        # A block that may drop its reduction has two sets of weights in the folder, and one of them is read.
        replaced = {self._family.stored(name.removeprefix(DROPPED)) for name in read if name.startswith(DROPPED)}
        unread -= {name for name in unread if name.startswith(DROPPED)} | replaced
        if unknown := unread - ({HEAD} if tied else set()):
            raise ValueError(
                f"{self._folder} has tensors that no part of the model takes: {sorted(unknown)[:3]}; "
                "use a checkpoint of the architecture that its config.json names"
            )
        if unread:
            refuse_other_head(self._folder)


@torch.no_grad()
def load(model: GPTModel, read: TensorSource, shape: ModelShape) -> None:
    """Fill every parameter of ``model``, a whole model or a pipeline stage, with Hugging Face tensors.

    Every rank of the model's groups calls this.

    Raises ValueError if a tensor is missing, quantised, not finite, or of another shape than the model's.  Also raises
    it if no rank reads some tensor of the source: without that tensor, the model could give wrong results.
    """
    groups = model.pg_collection
    fill(tensor_views(model, shape), read, groups.tp.rank())
    of_stage = set().union(*gather_values(read.read_names, groups.ep))
    read.refuse_unread(shape.tied, set().union(*gather_values(of_stage, groups.pp)))


@torch.no_grad()
def fill(targets: Iterable[TensorView], read: Callable[[str], Tensor], tp_rank: int) -> None:
    """Copy tensor-parallel rank ``tp_rank``'s shard of each tensor into its view.

    ``read`` gets the name of a target and returns the whole tensor.

    Raises ValueError if a tensor has another shape than the model's, or values that are NaN or infinite, including
    those that become infinite only in the model's dtype.
    """
    for target in targets:
        tensor = read(target.name)
        if tuple(tensor.shape) != target.full_shape:
            raise ValueError(
                f"{target.name}: the checkpoint has shape {tuple(tensor.shape)}, the model {target.full_shape}; "
                "use the config.json that belongs to the checkpoint"
            )
        target.view.copy_(_shard_of(tensor, target, tp_rank).reshape(target.view.shape))
        _refuse_not_finite(target, tensor)


def _refuse_not_finite(target: TensorView, tensor: Tensor) -> None:
    # aminmax keeps a NaN, and reads the values once.
    if torch.stack(target.view.aminmax()).isfinite().all():
        return
    if tensor.isfinite().all():
        raise ValueError(f"{target.name} has values beyond the range of {target.view.dtype}: use model.dtype=float32")
    raise ValueError(f"{target.name} has values that are NaN or infinite: use a checkpoint that is not damaged")


def _shard_of(tensor: Tensor, target: TensorView, tp_rank: int) -> Tensor:
    """Return tensor-parallel rank ``tp_rank``'s shard of ``tensor``, with zeros where it is padded."""
    if target.shard_dim is None:
        return tensor
    groups, rows, *rest = target.view.shape
    length = (groups * rows, *rest)[target.shard_dim]
    _, shard, _ = tensor.tensor_split([tp_rank * length, (tp_rank + 1) * length], target.shard_dim)
    missing = length - shard.shape[target.shard_dim]
    # Padding occurs only in the rows of the vocabulary, so dim 0 is extended.
    return torch.cat([shard, shard.new_zeros(missing, *rest)]) if missing else shard


def gather_values(value: Value, group: dist.ProcessGroup) -> list[Value]:
    """Return every rank's ``value``, in rank order.  It is also a barrier: all of ``group`` call before any returns."""
    if group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
