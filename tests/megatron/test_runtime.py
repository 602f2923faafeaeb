"""A megatron-core collective that fails is named in the error, with its ranks."""

import os

import pytest
import torch

from longctx.config import Mesh
from longctx.parallel.launch import Rank, RankFailed, run_ranks


def reduce_without_a_peer(rank: Rank) -> None:
    """Rank 3 exits, and rank 2 starts an all-reduce with it."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, Mesh(tp=2, dp=2), timeout_minutes=1) as runtime:
        if rank.rank == 3:
            os._exit(0)
        if rank.rank == 2:
            reduce_from_tensor_model_parallel_region(torch.ones(3), runtime.groups.tp)


def test_failed_megatron_core_collective_is_named_with_its_ranks() -> None:
    with pytest.raises(RankFailed, match=r"rank 2 of 4 raised LostPeer: all_reduce of ranks 2, 3 failed: "):
        run_ranks(4, reduce_without_a_peer)
