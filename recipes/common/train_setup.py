"""Setup of each rank of a training run: the model with its optimizer, and context parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.common.train_job import TrainJob

if TYPE_CHECKING:
    from longctx.attention.kernel import Kernel
    from longctx.megatron.runtime import Runtime
    from longctx.megatron.training.state import TrainState
    from longctx.train.step import ContextParallel


def build_state(runtime: Runtime, job: TrainJob) -> TrainState:
    """Return this rank's part of the model with its initial weights, and its optimizer; every rank calls this."""
    import torch

    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import layers_in_use
    from longctx.megatron.training.state import build_train_state

    target = job.target
    dropped = target.plan.dropped if target.plan else ()
    read = hf_load.Weights(job.weights, dropped) if job.weights else RandomInit(target.shape, job.settings.seed)
    return build_train_state(
        runtime,
        target.shape,
        job.optim,
        lambda net: hf_load.load(net, read, target.shape),
        dtype=getattr(torch, target.model.dtype),
        layers="local" if job.lora.rank else layers_in_use(target.model.layers, target.shape),
        steps=job.settings.steps,
        recompute=job.settings.recompute,
        loss_rows=job.settings.loss_rows,
        mlp_rows=job.settings.mlp_rows,
        plan=target.plan,
        lora=job.lora,
        fp8=target.model.fp8,
        seed=job.settings.seed,
    )


def context_parallel(runtime: Runtime, state: TrainState, job: TrainJob, kernel: Kernel) -> ContextParallel:
    """Return how ``job``'s ranks share sequences and attend to them, and where activations wait for the backward."""
    import torch

    from longctx.megatron.training.offload import open_offload
    from longctx.parallel.strategy import STRATEGIES
    from longctx.parallel.validate import FP8_ROWS
    from longctx.train.step import ContextParallel

    context, settings = job.target.context, job.settings
    return ContextParallel(
        job.data.length,
        context.layout,
        kernel,
        STRATEGIES[context.strategy],
        keep_partials=settings.recompute != "none",
        dtype=getattr(torch, job.target.model.dtype),
        check_schedule=context.check_schedule,
        offload=open_offload(settings.offload, state.net.parameters(), runtime.device),
        row_multiple=FP8_ROWS[job.target.model.fp8],
    )
