"""Cost of a prefill and of decoded tokens, with the time that ranks spend in reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from longctx.config import Context, Sampling
from recipes.bench import timing

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.megatron.runtime import Runtime


@dataclass(frozen=True)
class PhaseCost:
    """Cost of a prefill, or of one decoded token: the slowest rank's ``seconds``, and the tensor-parallel reductions.

    ``calls`` and ``bytes`` count this rank's reductions.  ``reducing`` is the least time, in seconds, that any rank
    spent in reductions.  A rank that arrives early also waits inside them, so the rank that arrives last shows how long
    the reductions themselves take.
    """

    seconds: float
    reducing: float
    calls: float
    bytes: float


def time_phases(runtime: Runtime, engine: Engine, tokens: Sequence[int], new_tokens: int) -> dict[str, PhaseCost]:
    """Return, by phase, the cost of "prefill" (the whole prompt ``tokens``) and of "decode" (one token).

    The prefill also gives the first new token; "decode" is the mean over ``new_tokens`` more.  Every rank calls this.
    """
    from longctx.infer.session import Session

    session = Session(engine, Context(), Sampling())

    def prefill() -> None:
        session.turn({0: tokens}, {0: 1})

    def decode() -> None:
        for _ in range(new_tokens):
            session.decode([0])

    prefill_cost = measure_phase(runtime, prefill, 1)
    return {"prefill": prefill_cost, "decode": measure_phase(runtime, decode, new_tokens)}


def measure_phase(runtime: Runtime, work: Callable[[], None], steps: int) -> PhaseCost:
    """Start ``work`` on all ranks at once, and run it once; every rank calls this.

    Return the cost of ``work`` divided by ``steps``, the number of its equal steps.
    """
    from longctx.parallel.measure.all_reduce import count_all_reduces

    timing.barrier(runtime.world)
    with count_all_reduces() as tally:
        elapsed = timing.measure_seconds(work)
    seconds, reducing = timing.gather_numbers(runtime.world, elapsed / steps, tally.seconds / steps)
    return PhaseCost(max(seconds), min(reducing), tally.calls / steps, tally.bytes / steps)


def median_cost(costs: list[PhaseCost]) -> PhaseCost:
    """Return the median of each field of ``costs``."""
    return PhaseCost(*(median(getattr(cost, name) for cost in costs) for name in vars(costs[0])))
