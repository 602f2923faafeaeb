"""Stop a run early on a signal: all ranks agree at the same step, so that the run can save and resume later."""

import signal
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Tensor

SIGNAL = signal.SIGUSR1  # Slurm sends it before a time limit or pre-emption (slurm/job.sbatch)


class StopRequest:
    """Records whether `SIGNAL` has arrived since this object was created, which replaces the signal's handler.

    Call `agreed_on_all_ranks` once a step, on every rank.  ``agreed_on`` is the result of the last call.
    """

    def __init__(self) -> None:
        self._received = self.agreed_on = False
        signal.signal(SIGNAL, self._receive)

    def _receive(self, *_: Any) -> None:
        self._received = True

    @property
    def received(self) -> bool:
        """True once this rank has received the signal."""
        return self._received

    def agreed_on_all_ranks(self, world: Comm, device: torch.device) -> bool:
        """Return True, on every rank of ``world``, once any of them has received the signal (an all-gather)."""
        received: Tensor = torch.tensor([int(self._received)], device=device)
        self.agreed_on = any(bool(each.item()) for each in world.all_gather(received, [(1,)] * world.size))
        return self.agreed_on

    def over(self) -> None:
        """Ignore the signal from now on, because the run is about to end by itself.

        At exit, Python restores the default handlers, and a late signal would kill the process.
        """
        signal.signal(SIGNAL, signal.SIG_IGN)
