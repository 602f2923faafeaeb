"""Stop a run early on a signal: all ranks agree at the same step, so that the run can save and resume later."""

import signal
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Tensor

SIGNAL = signal.SIGUSR1  # Slurm sends it before a time limit or pre-emption (slurm/job.sbatch)


class StopRequest:
    """Records whether `SIGNAL` has arrived since this object was created, which replaces the signal's handler.

    Call `agreed_on_all_ranks` once a step, on every rank.  After the last call, ``agreed_on`` says whether a rank has
    received the signal, and ``has_fault`` whether one had a fault.
    """

    def __init__(self) -> None:
        self._received = self.agreed_on = self.has_fault = False
        signal.signal(SIGNAL, self._receive)

    def _receive(self, *_: Any) -> None:
        self._received = True

    @property
    def received(self) -> bool:
        """True once this rank has received the signal."""
        return self._received

    def agreed_on_all_ranks(self, world: Comm, device: torch.device, *, fault: bool = False) -> bool:
        """Return True, on every rank of ``world``, once one has received the signal or has a ``fault`` (all-gather)."""
        own: Tensor = torch.tensor([int(self._received), int(fault)], device=device)
        signals, faults = zip(*(each.tolist() for each in world.all_gather(own, [(2,)] * world.size)), strict=True)
        self.agreed_on, self.has_fault = any(signals), any(faults)
        return self.agreed_on or self.has_fault

    def over(self) -> None:
        """Ignore the signal from now on, because the run is about to end by itself.

        At exit, Python restores the default handlers, and a late signal would kill the process.
        """
        signal.signal(SIGNAL, signal.SIG_IGN)
