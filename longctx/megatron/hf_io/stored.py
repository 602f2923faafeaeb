"""Tensors of files that hold several canonical tensors: rows one after the other, or a stack of all experts."""

from collections.abc import Sequence

import torch

from longctx.shapes import Shaped, Tensor


def join(parts: Sequence[Shaped[Tensor, "_ ..."]], interleaved: int) -> Shaped[Tensor, "_ ..."]:
    """Return the tensor of a file that holds ``parts``.

    Rows are concatenated if ``interleaved`` is 0.  Otherwise ``parts`` are those of expert 0, then of expert 1 and so
    on, ``interleaved`` of each.  Their transposes are stacked, and the columns of one expert alternate: with gate and
    up projections [ffn hidden] of E experts, the result is [E hidden 2*ffn] of columns gate 0, up 0, gate 1, up 1, ...
    """
    if not interleaved:
        return torch.cat(list(parts))
    by_expert = torch.stack(list(parts)).unflatten(0, (-1, interleaved))
    transposed: Tensor = by_expert.permute(0, *range(by_expert.dim() - 1, 0, -1))
    return transposed.flatten(-2).contiguous()


def part_of_expert(stacked: Shaped[Tensor, "... columns"], index: int, interleaved: int) -> Shaped[Tensor, "rows ..."]:
    """Return tensor ``index`` of the ``interleaved`` ones in ``stacked``, one expert's entry of what `join` returns."""
    part: Tensor = stacked.unflatten(-1, (-1, interleaved))[..., index]
    return part.permute(*range(part.dim() - 1, -1, -1))
