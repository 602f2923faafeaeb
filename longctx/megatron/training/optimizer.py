"""Training with megatron-core: gradient buffers, optimizer, learning-rate schedule, and pipelined passes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import GlobalMemoryBuffer

from longctx.config import Optim, Recompute
from longctx.megatron.attention import Pass
from longctx.megatron.experts import connect_experts, connect_router_loss
from longctx.megatron.loss import loss_of
from longctx.megatron.model import GPTModel, build_model, run_stage
from longctx.megatron.runtime import Runtime
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.parallel.cross_entropy import ROWS
from longctx.parallel.router_loss import RouterLoss
from longctx.shapes import Float, Int, Positions, Tensor, Tokens
from longctx.spd.plan import SPDPlan


@dataclass(frozen=True)
class MicroBatch:
    """This rank's rows of one packed sequence, padded so that every rank has equally many.

    ``mask`` is 1 for rows whose target counts in the loss, otherwise 0 (padding included).  ``bucket`` is the index of
    the sum that a row's loss is added to.  The rows after the first ``rows`` are padding.  ``mean_counted`` is the
    number of targets that count in the loss, divided by the number of sequences, both of the whole batch.
    """

    tokens: Tokens
    targets: Tokens
    mask: Float[Tensor, " s"]
    bucket: Positions
    attention_pass: Pass
    rows: int
    mean_counted: float


@dataclass(frozen=True)
class TrainState:
    """A model in training, with its optimizer and learning-rate schedule.

    ``net`` has the layers of this pipeline stage.  ``model`` wraps ``net`` with gradient buffers.  Logits of at most
    ``loss_rows`` rows exist at a time (None: all).  ``router_loss`` is None for a model without one.
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


@dataclass(frozen=True)
class LossSums:
    """Per bucket, the sum of losses (nats) and the number of counted tokens, over all ranks and micro-batches."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean loss (nats per token) over all buckets; 0 if no token counts."""
        return sum(self.losses) / max(1, sum(self.tokens))

    @property
    def means(self) -> tuple[float | None, ...]:
        """Mean loss (nats per token) of each bucket; None for a bucket without tokens."""
        return tuple(loss / n if n else None for loss, n in zip(self.losses, self.tokens, strict=True))


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
) -> TrainState:
    """Build a model of ``shape`` on ``runtime``'s mesh, fill it with ``load``, and set up training for ``steps`` steps.

    The loss computes ``loss_rows`` rows at a time, an MLP ``mlp_rows`` (None: all).  The blocks that ``plan`` names
    drop a reduction, in the forward and in the backward pass.
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
        pipeline_model_parallel_size=runtime.mesh.pp,
        pipeline_dtype=dtype,
        batch_p2p_sync=False,
        sequence_parallel=runtime.mesh.sequence_parallel,
        # Gradients are summed over all ranks and divided by the total number of tokens at the end, so that the
        # token-weighted loss is the same on every mesh.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **_RECOMPUTE[recompute],
    ).train()
    load(net)
    connect_experts(net, runtime.ep, runtime.tp)
    router_loss = connect_router_loss(net, shape, runtime.tp_context)
    assert router_loss is None or runtime.mesh.pp == 1, "recipes reject pipelines with a router loss"
    # 2. Gradient buffers, which reduce over data-parallel and context-parallel ranks.
    model = DistributedDataParallel(
        net.config,
        # The norm of `optimizer_step` shows NaN to all ranks; megatron-core's own check ends only some of them.
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=dtype != torch.float64,
            use_distributed_optimizer=optim.zero1,
            check_for_nan_in_grad=False,
        ),
        net,
    )
    net.config.no_sync_func = model.no_sync
    # 3. Optimizer and schedule.
    optimizer = get_megatron_optimizer(_optimizer_config(optim, dtype), [model])
    schedule = _schedule(optimizer, optim, steps)
    return TrainState(model, net, optimizer, schedule, optim, shape, runtime.groups, runtime.tp, loss_rows, router_loss)


def apply_optim_settings(train_state: TrainState) -> None:
    """Apply this run's optimizer settings, replacing those of a checkpoint that has just been loaded."""
    optim = train_state.optim
    for group in train_state.optimizer.param_groups:
        group |= {"max_lr": optim.lr, "min_lr": optim.min_lr, "betas": tuple(optim.betas), "eps": optim.eps}
    train_state.schedule.step(increment=0)


def _optimizer_config(optim: Optim, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
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
        min_lr=optim.min_lr,
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


def forward_backward(
    train_state: TrainState, batches: Iterable[MicroBatch], *, learn: bool = True, buckets: int = 1
) -> LossSums:
    """Run the micro-batches ``batches``, equally many on every rank, and return their loss sums.

    With ``learn``, also compute the gradients of the mean loss; otherwise run forward only.
    """
    batches = list(batches)
    run = get_forward_backward_func()
    rows, config = batches[0].tokens.shape[1], train_state.net.config
    reports = run(
        forward_step_func=partial(_forward_step, train_state, buckets),
        data_iterator=iter(batches),
        model=train_state.model,
        num_microbatches=len(batches),
        seq_length=rows * config.context_parallel_size,  # determines the shape of tensors sent between stages
        micro_batch_size=1,
        forward_only=not learn,
    )
    # Only the last stage has reports; the others contribute zeros to the sums.
    sums = torch.stack(reports).sum(0) if reports else torch.zeros(2, buckets, dtype=torch.float64)
    sums = sums.to(batches[0].mask.device)
    dist.all_reduce(sums, group=train_state.groups.dp_cp)
    dist.all_reduce(sums, group=train_state.groups.pp)
    return LossSums(tuple(sums[0].tolist()), tuple(int(n) for n in sums[1]))


def _forward_step(
    train_state: TrainState, buckets: int, batches: Iterator[MicroBatch], _: MegatronModule
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run the next micro-batch; return the stage's output and the function that megatron-core applies to the loss."""
    batch, net = next(batches), train_state.net
    with _balanced(train_state, batch):
        hidden = run_stage(net, batch.tokens, batch.attention_pass)
    if not net.post_process:
        return hidden, partial(_report, batch, buckets)  # megatron-core calls it on the last stage only
    loss, losses = loss_of(
        net, hidden, batch.targets[0], batch.mask, train_state.tp, train_state.shape, train_state.loss_rows
    )
    return loss, partial(_report, batch, buckets, losses)


@contextmanager
def _balanced(train_state: TrainState, batch: MicroBatch) -> Iterator[None]:
    """Make the training pass inside the ``with`` block add the gradient of the router loss, if there is one.

    megatron-core divides the sum of all gradients by the number of counted targets.  The weight of a sequence undoes
    this, so that the mean router loss of the batch's sequences is added to the mean loss of its targets.
    """
    router_loss, tp = train_state.router_loss, train_state.tp
    if router_loss is None or not train_state.net.training:
        yield
        return
    shard = batch.tokens.shape[1] // tp.size  # sequence parallelism shards rows
    router_loss.begin(min(max(0, batch.rows - tp.rank * shard), shard))
    yield
    assert train_state.shape.mixture
    router_loss.finish(train_state.shape.mixture.router_loss * batch.mean_counted)


def mean_router_loss(train_state: TrainState) -> float | None:
    """Return the mean router loss of all sequences since the last call, without coefficient; None without such a loss.

    Every rank calls this.
    """
    if train_state.router_loss is None:
        return None
    mean = train_state.router_loss.take_mean() / train_state.groups.dp.size()
    dist.all_reduce(mean, group=train_state.groups.dp)
    return float(mean)


def _report(
    batch: MicroBatch, buckets: int, losses: Float[Tensor, " s"], loss: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""], Float[Tensor, "2 buckets"]]:
    """Return what megatron-core expects of a loss function: the loss to differentiate, its token count, a report.

    The report has the sums of losses and of counted tokens per bucket (float64).
    """
    report = torch.stack([losses * batch.mask, batch.mask]).double()
    sums = report.new_zeros(2, buckets).index_add(1, batch.bucket, report)
    return loss, batch.mask.sum().int(), sums


def optimizer_step(train_state: TrainState) -> tuple[float, float]:
    """Update the weights; return the gradient norm before clipping and the learning rate of this step.

    The norm covers all ranks' gradients, even without clipping; it is NaN or infinite if one of them is.
    """
    rate = train_state.optimizer.param_groups[0]["lr"]
    done, norm, _ = train_state.optimizer.step()
    assert done, "only a loss scaled for fp16 lets the optimizer skip a step"
    train_state.schedule.step(increment=1)
    return float(norm), float(rate)


def clear_gradients(train_state: TrainState) -> None:
    """Set all gradients to zero.  Call it before the first micro-batch of a step."""
    train_state.model.zero_grad_buffer()
    train_state.optimizer.zero_grad()


# For a `MemoryMeter`: what an update allocates, and megatron-core's buffer of rows gathered from tensor-parallel ranks.
ALLOCATORS = {"optimizer": (optimizer_step,), "communication": (GlobalMemoryBuffer.get_tensor,)}
