"""What the ranks of test_stop run."""

import os

from longctx.config import Mesh
from longctx.megatron.runtime import runtime
from longctx.parallel.launch import Rank
from longctx.train.stop import SIGNAL, StopRequest


def asked(rank: Rank, whom: int) -> tuple[bool, bool, bool]:
    """Whether this rank agrees to stop: before anybody is asked, after rank ``whom`` has been, and once more."""
    with runtime(rank, Mesh(ring=rank.world_size)) as here:
        stop = StopRequest()
        before = stop.agreed_on_all_ranks(here.world, here.device)
        if rank.rank == whom:
            os.kill(os.getpid(), SIGNAL)
        return (
            before,
            stop.agreed_on_all_ranks(here.world, here.device),
            stop.agreed_on_all_ranks(here.world, here.device),
        )
