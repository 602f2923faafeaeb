"""Tensors in files that hold several canonical tensors: concatenated rows, or a stack of all experts."""

from collections.abc import Sequence

import torch

from longctx.shapes import Shaped, Tensor


def join(parts: Sequence[Shaped[Tensor, "_ ..."]], interleaved: int) -> Shaped[Tensor, "_ ..."]:
    """Combine canonical tensors, ``parts``, into the tensor that a file holds.

    With ``interleaved`` 0, rows are concatenated.  Otherwise ``parts`` has ``interleaved`` tensors of expert 0, then as
    many of expert 1, and so on.  Example: gate and up projections [ffn hidden] of E experts, with ``interleaved`` 2.
    The result is [E hidden 2*ffn], and the columns of an expert are gate 0, up 0, gate 1, up 1, ...
    """
    if not interleaved:
        return torch.cat(list(parts))
    by_expert = torch.stack(list(parts)).unflatten(0, (-1, interleaved))
    transposed: Tensor = by_expert.permute(0, *range(by_expert.dim() - 1, 0, -1))
    return transposed.flatten(-2).contiguous()


def part_of_expert(stacked: Shaped[Tensor, "... columns"], index: int, interleaved: int) -> Shaped[Tensor, "rows ..."]:
    """Return canonical tensor ``index`` of an expert that has ``interleaved`` of them; inverse of `join`.

    ``stacked`` is the expert's entry, along dim 0, of the tensor that `join` returns.
    """
    part: Tensor = stacked.unflatten(-1, (-1, interleaved))[..., index]
    return part.permute(*range(part.dim() - 1, -1, -1))
