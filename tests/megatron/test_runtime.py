"""Process groups: a collective that nobody answers says what it is, also where it is megatron-core's own."""

import os

import pytest
import torch

from longctx.config import Mesh
from longctx.parallel.launch import Rank, RankFailed, run_ranks


def left_alone(rank: Rank) -> None:
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    from longctx.megatron.runtime import runtime

    with runtime(rank, Mesh(tp=2, dp=2), timeout_minutes=1) as here:
        if rank.rank == 3:
            os._exit(0)
        if rank.rank == 2:
            reduce_from_tensor_model_parallel_region(torch.ones(3), here.groups.tp)


def test_a_collective_of_megatron_core_that_fails_is_named_with_its_ranks() -> None:
    with pytest.raises(RankFailed, match=r"rank 2 of 4 raised LostPeer: all_reduce of ranks 2, 3 failed: "):
        run_ranks(4, left_alone)
