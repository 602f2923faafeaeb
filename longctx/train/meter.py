"""What a step of training cost: seconds, the share of the machine that they used, memory, and waiting for others."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.cost.training import mfu, train_flops
from longctx.model_shape import ModelShape
from longctx.parallel.measure.comm_timer import ExposedCommTimer


@dataclass(frozen=True)
class StepCost:
    """A step of ``tokens`` that ``ranks`` shared, as one of them saw it.

    ``flops`` of all of them, without causal halving, and ``flops_causal`` with it; ``peak_flops`` of one, or None;
    ``waited``: its seconds of exposed communication, by operation.
    """

    seconds: float
    tokens: int
    ranks: int
    flops: float
    flops_causal: float
    peak_flops: float | None
    peak_bytes: int
    waited: dict[str, float]

    def figures(self) -> dict[str, float | None]:
        """The figures that a tracker logs, grouped; MFU is None where no peak is known."""
        exposed = sum(self.waited.values())
        return {
            "step_s": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "mfu": mfu(self.flops, self.seconds, self.ranks, self.peak_flops),
            "mfu_causal": mfu(self.flops_causal, self.seconds, self.ranks, self.peak_flops),
            "mem/peak_bytes": self.peak_bytes,
            "comm/exposed_s": exposed,
            "comm/exposed_share": exposed / self.seconds,
            **{f"comm/{operation}_s": seconds for operation, seconds in self.waited.items()},
        }


class Meter:
    """Measures steps of a model of ``shape``, from ``begin`` to ``end``, on one of the ``ranks`` that share them.

    ``ranks`` is what the documents of a step are divided by: those of one data-parallel replica, or of all replicas if
    ``end`` is told all their documents.  ``waiting`` is what the rank's `TimedComm` groups count in: what goes past
    them (megatron-core's own collectives) is not in its seconds.  ``peak_flops`` of one rank: a hardware file's,
    `longctx.parallel.measure.probe.gemm_flops`, or None, and then there is no MFU.
    """

    def __init__(
        self,
        shape: ModelShape,
        ranks: int,
        device: torch.device,
        waiting: ExposedCommTimer,
        peak_flops: float | None = None,
    ) -> None:
        self.shape, self.ranks, self.device, self.waiting, self.peak_flops = shape, ranks, device, waiting, peak_flops
        self._began: float | None = None

    def begin(self) -> None:
        """The step begins now; nothing before it counts."""
        self._synchronize()
        self.waiting.pop_seconds()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = time.perf_counter()

    def end(self, lengths: Sequence[int]) -> StepCost:
        """What the step cost, which trained on documents of ``lengths`` tokens (of all its micro-batches)."""
        assert self._began is not None, "a step begins before it ends"
        self._synchronize()
        seconds, self._began = time.perf_counter() - self._began, None
        return StepCost(
            seconds=seconds,
            tokens=sum(lengths),
            ranks=self.ranks,
            flops=train_flops(self.shape, lengths, causal=False),
            flops_causal=train_flops(self.shape, lengths, causal=True),
            peak_flops=self.peak_flops,
            peak_bytes=peak_bytes(self.device),
            waited=self.waiting.pop_seconds(),
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use at once: on a GPU by tensors since the step began, on a CPU by the process in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
