"""Choose the decode strategy for ``context.decode=auto``, by the cost model and measured rates of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longctx.cost.decode import ON_ONE_RANK, choose_decode
from longctx.cost.forward import Numbers, decode_work

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.infer.session import DecodeChooser
    from longctx.megatron.runtime import Runtime
    from recipes.common.target import Target


def make_decode_chooser(runtime: Runtime, target: Target, engine: Engine) -> DecodeChooser | None:
    """Return a function from a batch size to a decode strategy and the reason; None unless ``context.decode=auto``.

    Measures this machine for about a second first, unless only one strategy can run.  All ranks must call
    `make_decode_chooser`, and their functions make the same choices.
    """
    import torch

    from longctx.megatron.products import linear
    from longctx.parallel.measure.probe import probe_decode
    from recipes.common.target import proves_sharded

    if target.context.decode != "auto":
        return None
    if engine.ranks == 1:
        return lambda _: ON_ONE_RANK
    if target.context.check_schedule and not proves_sharded(target.mesh, target.shape):
        return lambda _: ("gather_merge", "the messages of sharded cannot be checked here")
    if engine.share is None:
        return lambda _: ("gather_merge", "the ranks cannot share their weights")
    dtype = getattr(torch, target.model.dtype)
    hardware = probe_decode(runtime.world, dtype, runtime.device, linear)
    numbers = Numbers(dtype.itemsize, dtype.itemsize)
    return lambda batch: choose_decode(decode_work(target.shape, target.mesh, batch, numbers), hardware)
