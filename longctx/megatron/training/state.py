"""A model in training with megatron-core: gradient buffers, optimizer and learning-rate schedule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from longctx.config import LoRA, Optim, Recompute
from longctx.megatron.experts import connect_experts, connect_router_loss
from longctx.megatron.lora import attach_adapters
from longctx.megatron.model import GPTModel, build_model
from longctx.megatron.runtime import Runtime
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.parallel.cross_entropy import ROWS
from longctx.parallel.router_loss import RouterLoss
from longctx.spd.plan import SPDPlan


@dataclass(frozen=True)
class TrainState:
    """A model in training, with its optimizer and learning-rate schedule.

    ``net`` has the layers of this pipeline stage.  ``model`` wraps ``net`` with gradient buffers.  Logits of at most
    ``loss_rows`` rows exist at a time (None: all).  ``router_loss`` is None for a model without a router loss.
    """

    model: DistributedDataParallel
    net: GPTModel
    optimizer: Any
    schedule: OptimizerParamScheduler
    optim: Optim
    shape: ModelShape
    groups: ProcessGroupCollection
    tp: Comm
    loss_rows: int | None
    router_loss: RouterLoss | None


_RECOMPUTE: Mapping[Recompute, Mapping[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def build_train_state(
    runtime: Runtime,
    shape: ModelShape,
    optim: Optim,
    load: Callable[[GPTModel], None],
    *,
    dtype: torch.dtype,
    layers: str,
    steps: int,
    recompute: Recompute,
    loss_rows: int | None = ROWS,
    mlp_rows: int | None = None,
    plan: SPDPlan | None = None,
    lora: LoRA | None = None,
    fp8: str | None = None,
    seed: int = 0,
) -> TrainState:
    """Build a model of ``shape`` on ``runtime``'s mesh, fill it with ``load``, and set up training for ``steps`` steps.

    The loss computes ``loss_rows`` rows at a time, an MLP ``mlp_rows`` (None: all).  The blocks that ``plan`` names
    drop a reduction, in the forward and in the backward pass.  If ``lora`` has a rank, adapters are trained instead of
    the weights; ``seed`` draws their initial values.  ``fp8`` is `ModelSource.fp8`; `ContextParallel.row_multiple` is
    then `FP8_ROWS`.
    """
    assert plan is None or not plan.own_norms, "recipes reject per-rank norms in training"
    # 1. The model, with the fields of megatron-core's TransformerConfig that training needs.
    net = build_model(
        shape,
        runtime.groups,
        dtype=dtype,
        layers=layers,
        device=runtime.device,
        plan=plan,
        mlp_rows=mlp_rows,
        fp8=fp8,
        pipeline_model_parallel_size=runtime.mesh.pp,
        pipeline_dtype=dtype,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,  # a stage's output is not needed after it is sent
        sequence_parallel=runtime.mesh.sequence_parallel,
        # Gradients are summed over all ranks and divided by the total number of tokens at the end, so that the
        # token-weighted loss is the same on every mesh.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **_RECOMPUTE[recompute],
    ).train()
    load(net)
    if lora and lora.rank:
        attach_adapters(net, lora, seed)
    connect_experts(net, runtime.ep, runtime.tp)
    router_loss = connect_router_loss(net, shape, runtime.tp_context)
    assert router_loss is None or runtime.mesh.pp == 1, "recipes reject pipelines with a router loss"
    # 2. Gradient buffers, optimizer and schedule.
    model = _with_gradient_buffers(net, dtype, optim.zero1)
    optimizer = get_megatron_optimizer(_optimizer_config(optim, dtype), [model])
    schedule = _schedule(optimizer, optim, steps)
    return TrainState(model, net, optimizer, schedule, optim, shape, runtime.groups, runtime.tp, loss_rows, router_loss)


def _with_gradient_buffers(net: GPTModel, dtype: torch.dtype, zero1: bool) -> DistributedDataParallel:
    """Wrap ``net`` with gradient buffers, which are reduced over data-parallel and context-parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64,
        use_distributed_optimizer=zero1,
        # The norm of `optimizer_step` shows NaN to all ranks; megatron-core's own check ends only some of them.
        check_for_nan_in_grad=False,
    )
    model = DistributedDataParallel(net.config, config, net)
    net.config.no_sync_func = model.no_sync
    return model


def apply_optim_settings(train_state: TrainState) -> None:
    """Apply this run's optimizer settings, replacing those of a checkpoint that has just been loaded."""
    optim = train_state.optim
    for group in train_state.optimizer.param_groups:
        group |= {"max_lr": optim.lr, "min_lr": optim.final_lr, "betas": tuple(optim.betas), "eps": optim.eps}
    train_state.schedule.step(increment=0)


def _optimizer_config(optim: Optim, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.final_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optim.zero1,
    )


def _schedule(optimizer: Any, optim: Optim, steps: int) -> OptimizerParamScheduler:
    decay = max(optim.decay_steps or steps, optim.warmup + 1)  # a run may end during its warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / max(1, optim.warmup),  # the first step has this rate; at rate 0 it would change nothing
        max_lr=optim.lr,
        min_lr=optim.final_lr,
        lr_warmup_steps=optim.warmup,
        lr_decay_steps=decay,
        lr_decay_style=optim.decay,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        # A resumed run uses its own settings, not those in the checkpoint (see `apply_optim_settings`).
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
