"""Choose the strategy of each prefill pass for ``context.strategy=auto`` and the other rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longctx.cost.attention import Work
from longctx.cost.choice import RULES, choose, empirical_constants
from longctx.cost.hardware import Hardware
from recipes.common.hardware_file import read_hardware

if TYPE_CHECKING:
    import torch

    from longctx.attention.kernel import Kernel
    from longctx.infer.engine import Engine
    from longctx.infer.session import Chooser
    from longctx.megatron.runtime import Runtime
    from longctx.parallel.comm import Comm
    from recipes.common.target import Target


def read_constants(name: str | None, strategy: str) -> Hardware | None:
    """Return the constants in the hardware file ``name`` for the rule ``strategy``; None without a file.

    Raises ValueError for a file that ``strategy`` does not use because it is not a rule, and for a rule that needs
    constants that were not fitted.
    """
    hardware = read_hardware(name) if name else None
    if name and strategy not in RULES:
        raise ValueError(
            f"hardware={name} is not used by context.strategy={strategy}: leave it out, or use context.strategy=auto "
            "(or alg1, alg5, empirical)"
        )
    if strategy == "empirical":
        empirical_constants(hardware)
    return hardware


def make_strategy_chooser(
    runtime: Runtime, target: Target, engine: Engine, hardware: Hardware | None = None
) -> Chooser:
    """Return a function (new, cached, window) -> (strategy, reason) that chooses the strategy of each prefill pass.

    ``new`` and ``cached`` are tokens by sequence, ``window`` is that of the layers.  If ``context.strategy`` names a
    strategy, the function returns it.  If it names a rule, the function applies the rule to the constants in
    ``hardware``; without them, the ranks first measure them.  All ranks must call `make_strategy_chooser`.
    """
    import torch

    rule = target.context.strategy
    if rule not in RULES:
        return lambda *_: (rule, "as asked")
    measured = hardware or measure_ring(runtime, target)
    heads, kv_heads = heads_of_rank(target)
    element_bytes = getattr(torch, target.model.dtype).itemsize

    def choose_for(new: Sequence[int], cached: Sequence[int], window: int | None) -> tuple[str, str]:
        work = Work(new, cached, engine.ring.size, heads, kv_heads, target.shape.head_dim, element_bytes, window)
        choice = choose(rule, work, measured)
        layers = f" of window {window:,}" if window else ""
        return choice.strategy, f"{rule}{layers}: {choice.why}"

    return choose_for


def measure_ring(runtime: Runtime, target: Target) -> Hardware:
    """Measure the ring's links and one rank's kernel, with the heads that a rank holds.

    Every rank must call this, and all return the same numbers.
    """
    from longctx.parallel.measure.probe import probe

    return probe(*kernel_on_ring(runtime, target))


def kernel_on_ring(
    runtime: Runtime, target: Target
) -> tuple[Comm, Kernel, tuple[int, int], int, torch.dtype, torch.device]:
    """Return the arguments for `probe`: ring, kernel, a rank's (query, KV) heads, head dimension, dtype and device."""
    import torch

    from longctx.attention.backends import checked_kernel

    dtype, head_dim = target.model.dtype, target.shape.head_dim
    kernel = checked_kernel(target.context.kernel, runtime.device, dtype, head_dim, runtime.slowest)
    return runtime.ring, kernel, heads_of_rank(target), head_dim, getattr(torch, dtype), runtime.device


def heads_of_rank(target: Target) -> tuple[int, int]:
    """Return the numbers of (query, KV) heads that each rank has in attention."""
    share = target.mesh.tp * target.mesh.ulysses
    return target.shape.heads // share, max(1, target.shape.kv_heads // share)
