"""Process groups: how they are connected, and the message of a megatron-core collective that fails."""

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longctx.config import Mesh
from longctx.megatron import runtime as runtime_module
from longctx.megatron.runtime import Runtime
from longctx.parallel.launch import Rank, RankFailed, run_ranks
from longctx.parallel.threads import ThreadWorld, run_threads


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
    lost = r"rank 2 raised LostPeer: all_reduce of ranks 2, 3 failed: "
    with pytest.raises(RankFailed, match=rf"rank 3 of 4 exited with 0 before it had a result \({lost}"):
        run_ranks(4, reduce_without_a_peer)


@pytest.mark.parametrize(("device", "bound"), [("cuda", torch.device("cuda", 1)), ("cpu", None)])
def test_groups_on_gpus_are_connected_when_they_are_created(monkeypatch, tmp_path, device, bound) -> None:
    """Otherwise NCCL connects a group in its first exchange, in which a rank without rows has no part."""
    given: dict[str, Any] = {}

    class Initialized(Exception):
        pass

    def init_process_group(backend: str, **options: Any) -> None:
        given.update(options, backend=backend)
        raise Initialized

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(runtime_module, "refuse_no_gpu", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with (
        pytest.raises(Initialized),
        runtime_module.open_runtime(Rank(0, 1, 3, 4, f"file://{tmp_path}/store"), Mesh(), device=device),
    ):
        pass
    assert given["backend"] == {"cuda": "nccl", "cpu": "gloo"}[device]
    assert given["device_id"] == bound


def test_slowest_rank_counts_for_each_of_several_times() -> None:
    def rank_main(world: ThreadWorld, rank: int) -> list[float]:
        runtime = SimpleNamespace(world=world.group(rank), device=torch.device("cpu"))
        return Runtime.slowest(runtime, [float(rank), 5.0 - rank, math.inf if rank == 1 else 1.0])  # type: ignore[arg-type]

    assert run_threads(3, rank_main) == [[2.0, 5.0, math.inf]] * 3
