"""Which rank gets which heads and which neurons: changes that leave the model as it is where nothing drops.

Where a reduction is dropped, a rank's neurons see its own heads alone.  So heads that do the same are put on different
ranks, and neurons where they miss least (arXiv 2502.20727, 4.2.4).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from longctx.model_shape import ModelShape
from longctx.shapes import Float, Tensor


def scattered(features: Float[Tensor, "groups features"], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Equal sets of heads, or KV groups, one for each rank, so that distances inside the sets are large.

    From the order in which they come, the best two are exchanged as long as that helps.  Source: 2502.20727, Eq. 2; the
    paper does not name its clustering.
    """
    apart = torch.cdist(features.double(), features.double()).numpy()
    assert not len(features) % ranks, "as many on every rank"
    rank_of = np.repeat(np.arange(ranks), len(features) // ranks)
    while (pair := _best_exchange(rank_of, apart)) is not None:
        rank_of[list(pair)] = rank_of[list(pair[::-1])]
    return tuple(tuple(int(head) for head in np.flatnonzero(rank_of == rank)) for rank in range(ranks))


def _best_exchange(rank_of: np.ndarray, apart: np.ndarray) -> tuple[int, int] | None:
    """The two whose exchange brings most distance inside the sets; None if none does."""
    inside = rank_of[:, None] == np.unique(rank_of)[None]
    to_rank = apart @ inside  # of each one, its distance to every set
    own = to_rank[np.arange(len(rank_of)), rank_of]
    to_other = to_rank[:, rank_of]  # [a, b]: of a, to b's set
    gain = to_other + to_other.T - own[:, None] - own[None, :] - 2 * apart
    gain[rank_of[:, None] == rank_of[None]] = 0
    best = int(gain.argmax())
    pair = (best // len(rank_of), best % len(rank_of))
    return pair if gain[pair] > 1e-9 * apart.sum() else None


def matched(norms: Float[Tensor, "sets shards"]) -> tuple[int, ...]:
    """The shard of each set of heads, so that the MLP outputs' norms add up to the most (2502.20727, Eq. 3)."""
    _, shards = linear_sum_assignment(norms.double().numpy(), maximize=True)
    return tuple(int(shard) for shard in shards)


def placed(errors: Float[Tensor, "neurons ranks"]) -> tuple[int, ...]:
    """Neurons in the order of ranks, as many each, so that their ``errors`` on their ranks add up to the least.

    Not of the paper, which moves the shards of the MLP as they are: an MLP is the sum of its neurons, in any order.
    """
    neurons, ranks = errors.shape
    each = neurons // ranks
    assert each * ranks == neurons, "as many on every rank"
    _, seats = linear_sum_assignment(errors.double().repeat_interleave(each, 1).numpy())
    return tuple(int(neuron) for neuron in np.argsort(seats // each, kind="stable"))


def regrouped(
    tensors: Mapping[str, Tensor], shape: ModelShape, groups: Sequence[int], neurons: Sequence[int]
) -> dict[str, Tensor]:
    """A block's Hugging Face tensors with KV groups and neurons in another order: the same function.

    A KV group moves with its query heads: their columns of the output projection, their rows of the others.
    """
    with_group = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    with_neuron = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    order, on = torch.tensor(groups), torch.tensor(neurons)

    def moved(part: str, tensor: Tensor) -> Tensor:
        if part in with_group:
            dim = with_group[part]
            return tensor.unflatten(dim, (shape.kv_heads, -1)).index_select(dim, order).flatten(dim, dim + 1)
        return tensor.index_select(with_neuron[part], on) if part in with_neuron else tensor

    return {name: moved(name.split(".")[-2], tensor) for name, tensor in tensors.items()}
