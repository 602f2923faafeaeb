"""Assign attention heads and MLP neurons to tensor-parallel ranks without changing the full model's function.

If a reduction is dropped, a rank's neurons see only that rank's heads.  Similar heads therefore go to different ranks,
and each neuron goes to the rank where its error is least (arXiv 2502.20727, 4.2.4).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from longctx.model_shape import ModelShape
from longctx.shapes import Float, Tensor


def assign_heads(features: Float[Tensor, "groups features"], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Divide heads (or KV groups) equally among ``ranks`` ranks, so that heads of one rank differ as much as possible.

    Returns each rank's heads in ascending order; ``features[i]`` describes head i.  Starts from consecutive heads and
    swaps the two heads that increase the total distance within ranks most, until no swap increases it.  Source: arXiv
    2502.20727, Eq. 2; the paper does not name its clustering.
    """
    distances = torch.cdist(features.double(), features.double()).cpu().numpy()
    assert not len(features) % ranks, "every rank takes the same number of heads"
    rank_of = np.repeat(np.arange(ranks), len(features) // ranks)
    while (pair := _best_exchange(rank_of, distances)) is not None:
        rank_of[list(pair)] = rank_of[list(pair[::-1])]
    return tuple(tuple(int(head) for head in np.flatnonzero(rank_of == rank)) for rank in range(ranks))


def _best_exchange(rank_of: NDArray[Any], distances: NDArray[Any]) -> tuple[int, int] | None:
    """Return the two heads whose swap adds most to the total distance within ranks; None if no swap adds any."""
    inside = rank_of[:, None] == np.unique(rank_of)[None]
    to_rank = distances @ inside  # [head, rank]: distance of a head to all heads of a rank
    own = to_rank[np.arange(len(rank_of)), rank_of]
    to_other = to_rank[:, rank_of]  # [a, b]: distance of head a to the set of head b
    gain = to_other + to_other.T - own[:, None] - own[None, :] - 2 * distances
    gain[rank_of[:, None] == rank_of[None]] = 0
    best = int(gain.argmax())
    pair = (best // len(rank_of), best % len(rank_of))
    return pair if gain[pair] > 1e-9 * distances.sum() else None


def assign_shards(norms: Float[Tensor, "sets shards"]) -> tuple[int, ...]:
    """Assign one MLP shard to each set of heads, so that the sum of output norms is largest; return each set's shard.

    Source: arXiv 2502.20727, Eq. 3.  ``norms[s, m]`` is the output norm of shard m when it sees the heads of set s.
    """
    _, shards = linear_sum_assignment(norms.double().cpu().numpy(), maximize=True)
    return tuple(int(shard) for shard in shards)


def assign_neurons(errors: Float[Tensor, "neurons ranks"]) -> tuple[int, ...]:
    """Assign equally many neurons to each rank, so that the sum of ``errors`` is least; return them rank by rank.

    ``errors[n, r]`` is the error of neuron n on rank r.  The result lists rank 0's neurons first, then rank 1's.  Not
    in the paper, which moves whole shards of the MLP: an MLP is the sum of its neurons in any order.
    """
    neurons, ranks = errors.shape
    per_rank = neurons // ranks
    assert per_rank * ranks == neurons, "every rank takes the same number of neurons"
    # A rank has a column for each of its neurons: rank r has columns r * per_rank to (r + 1) * per_rank - 1.
    _, columns = linear_sum_assignment(errors.double().repeat_interleave(per_rank, 1).cpu().numpy())
    return tuple(int(neuron) for neuron in np.argsort(columns // per_rank, kind="stable"))


def reorder_block(
    tensors: Mapping[str, Tensor], shape: ModelShape, groups: Sequence[int], neurons: Sequence[int]
) -> dict[str, Tensor]:
    """Return a block's tensors with KV groups and neurons in a new order; the block computes the same function.

    Position i of the new order holds KV group ``groups[i]`` and neuron ``neurons[i]``.  A KV group moves with its query
    heads: their columns of the output projection, their rows of the other projections.  Attention sinks and QK-norms
    over all heads do not move, so a block that has them would compute another function.
    """
    group_dims = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    neuron_dims = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}

    def reorder(module: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 and module in ("o_proj", "down_proj"):
            return tensor  # a bias of the output, which keeps its order
        if module in group_dims:
            dim = group_dims[module]
            grouped: Tensor = tensor.unflatten(dim, (shape.kv_heads, -1))
            return grouped.index_select(dim, torch.tensor(groups, device=tensor.device)).flatten(dim, dim + 1)
        if module in neuron_dims:
            return tensor.index_select(neuron_dims[module], torch.tensor(neurons, device=tensor.device))
        return tensor

    return {name: reorder(name.split(".")[-2], tensor) for name, tensor in tensors.items()}
