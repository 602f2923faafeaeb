"""Asked to stop, before the time is over: every rank hears of it at the same step, saves, and the run goes on later."""

import signal
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Tensor

SIGNAL = signal.SIGUSR1  # what Slurm sends ahead of a time limit or of pre-emption (slurm/job.sbatch)


class StopRequest:
    """Listens from now on; ask `agreed_on_all_ranks` once a step, on every rank.  ``agreed_on`` is its last answer."""

    def __init__(self) -> None:
        self._heard = self.agreed_on = False
        signal.signal(SIGNAL, self._hear)

    def _hear(self, *_: Any) -> None:
        self._heard = True

    def agreed_on_all_ranks(self, world: Comm, device: torch.device) -> bool:
        """Whether any rank of ``world`` has been asked; the same answer on all of them."""
        heard: Tensor = torch.tensor([int(self._heard)], device=device)
        self.agreed_on = any(bool(each.item()) for each in world.all_gather(heard, [(1,)] * world.size))
        return self.agreed_on

    def over(self) -> None:
        """It ends by itself now, and being asked again changes nothing.

        Python gives its own handlers back while it ends, and the signal would kill what it then meets.
        """
        signal.signal(SIGNAL, signal.SIG_IGN)
