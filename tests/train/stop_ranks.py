"""The function that the ranks of test_stop run."""

import os

from longctx.config import Mesh
from longctx.megatron.runtime import open_runtime
from longctx.parallel.launch import Rank
from longctx.train.stop import SIGNAL, StopRequest


def faults(rank: Rank, faulty: int) -> tuple[bool, bool, bool]:
    """A result of `agreed_on_all_ranks` if only rank ``faulty`` has a fault, and what is then agreed on."""
    with open_runtime(rank, Mesh(ring=rank.world_size)) as runtime:
        stop = StopRequest()
        stops = stop.agreed_on_all_ranks(runtime.world, runtime.device, fault=rank.rank == faulty)
        return stops, stop.agreed_on, stop.has_fault


def agreements(rank: Rank, signaled: int) -> tuple[bool, bool, bool]:
    """Three results of `agreed_on_all_ranks`: before rank ``signaled`` gets the signal, after it, and once more."""
    with open_runtime(rank, Mesh(ring=rank.world_size)) as runtime:
        stop = StopRequest()
        before = stop.agreed_on_all_ranks(runtime.world, runtime.device)
        if rank.rank == signaled:
            os.kill(os.getpid(), SIGNAL)
        return (
            before,
            stop.agreed_on_all_ranks(runtime.world, runtime.device),
            stop.agreed_on_all_ranks(runtime.world, runtime.device),
        )
