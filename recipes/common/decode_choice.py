"""Choose the decode strategy for ``context.decode=auto``, by the cost model and measured rates of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longctx.cost.decode import DecodeWork, choose_decode
from longctx.cost.training import train_flops_by_part

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.infer.session import DecodeChooser
    from longctx.megatron.runtime import Runtime
    from recipes.common.target import Target


def make_decode_chooser(runtime: Runtime, target: Target, engine: Engine) -> DecodeChooser | None:
    """Return a function that chooses the strategy for a batch size; None unless ``context.decode=auto``.

    It first measures the machine for a second.  All ranks must call it; they get the same choices.
    """
    import torch

    from longctx.parallel.measure.probe import probe_decode

    if target.context.decode != "auto":
        return None
    if engine.share is None:
        return lambda _: ("gather_merge", "the ranks cannot share their weights")
    dtype = getattr(torch, target.model.dtype)
    hardware = probe_decode(runtime.world, dtype, runtime.device)
    return lambda batch: choose_decode(decode_work(target, batch, dtype.itemsize), hardware)


def decode_work(target: Target, batch: int, element_bytes: int) -> DecodeWork:
    """Return the work of a decode step of ``batch`` sequences on the mesh of ``target``."""
    shape, tp = target.shape, target.mesh.tp
    # A token's forward and backward are 6 FLOPs for each weight.
    weights = {part: flops // 6 for part, flops in train_flops_by_part(shape, [1], causal=True).items()}
    return DecodeWork(
        batch=batch,
        ranks=target.mesh.context,
        layers=shape.layers,
        layer_weights=(weights["projections"] + weights["ffn"]) // shape.layers // tp,
        head_weights=weights["head"] // tp,
        hidden=shape.hidden,
        heads=shape.heads // tp,
        kv_heads=shape.kv_heads // tp,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size // tp,
        element_bytes=element_bytes,
    )
