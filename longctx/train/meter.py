"""Measure a training step: seconds, model FLOPs utilization (MFU), peak memory, and exposed communication."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.cost.training import mfu, train_flops
from longctx.model_shape import ModelShape
from longctx.parallel.measure.comm_timer import ExposedCommTimer


@dataclass(frozen=True)
class StepCost:
    """Cost of a step on one rank; ``ranks`` ranks shared the step's ``tokens``.

    ``flops`` are the FLOPs of all ``ranks`` without causal halving, ``flops_causal`` with it.  ``peak_flops`` is the
    peak rate of one rank in FLOP/s, or None if it is not known.  ``peak_bytes`` is this rank's peak memory.
    ``exposed_s`` has this rank's seconds of exposed communication by operation.
    """

    seconds: float
    tokens: int
    ranks: int
    flops: float
    flops_causal: float
    peak_flops: float | None
    peak_bytes: int
    exposed_s: dict[str, float]

    def figures(self) -> dict[str, float | None]:
        """Return the metrics for a tracker, by name.

        The MFUs, with and without causal halving, are None if the peak rate is not known.
        """
        exposed = sum(self.exposed_s.values())
        return {
            "step_s": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "mfu": mfu(self.flops, self.seconds, self.ranks, self.peak_flops),
            "mfu_causal": mfu(self.flops_causal, self.seconds, self.ranks, self.peak_flops),
            "mem/peak_bytes": self.peak_bytes,
            "comm/exposed_s": exposed,
            "comm/exposed_share": exposed / self.seconds,
            **{f"comm/{operation}_s": seconds for operation, seconds in self.exposed_s.items()},
        }


class Meter:
    """Measures steps of a model of ``shape`` on one rank, each between ``begin`` and ``end``.

    ``ranks`` is the number of ranks that share the documents whose lengths ``end`` takes.  ``comm_timer`` is the timer
    of the rank's `TimedComm` groups; communication that bypasses them (megatron-core's own collectives) is not counted.
    ``peak_flops`` is one rank's peak rate in FLOP/s, from a hardware file or
    `longctx.parallel.measure.probe.gemm_flops`; None means no MFU."""

    def __init__(
        self,
        shape: ModelShape,
        ranks: int,
        device: torch.device,
        comm_timer: ExposedCommTimer,
        peak_flops: float | None = None,
    ) -> None:
        self.shape, self.ranks, self.device, self.peak_flops = shape, ranks, device, peak_flops
        self.comm_timer = comm_timer
        self._began: float | None = None

    def begin(self) -> None:
        """Start measuring a step: reset the timer of communication and, on a GPU, peak memory."""
        self._synchronize()
        self.comm_timer.pop_seconds()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = time.perf_counter()

    def end(self, lengths: Sequence[int]) -> StepCost:
        """Return the cost of the step, whose micro-batches held documents of ``lengths`` tokens."""
        assert self._began is not None, "begin() comes before end()"
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
            exposed_s=self.comm_timer.pop_seconds(),
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes: on a GPU, of tensors since `Meter.begin`; on a CPU, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB on Linux
