"""megatron-core's training machinery, assembled: gradient buffers, optimizer, schedule, pipeline."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from longctx.config import Optim, Recompute
from longctx.megatron.attention import Pass
from longctx.megatron.model import GPTModel, build_model, token_losses
from longctx.megatron.runtime import Runtime
from longctx.model_shape import ModelShape
from longctx.shapes import Float, Positions, Tensor, Tokens
from longctx.spd.plan import SPDPlan


@dataclass(frozen=True)
class MicroBatch:
    """This rank's rows of one packed sequence, filled up to as many on every rank.

    ``mask`` is 0 where none counts; ``bucket`` says which of the sums a row belongs to.
    """

    tokens: Tokens
    targets: Tokens
    mask: Float[Tensor, " s"]
    bucket: Positions
    angles: Float[Tensor, "s 1 1 d"]
    one_pass: Pass


@dataclass(frozen=True)
class TrainState:
    """A model with what trains it: ``model`` is its gradient buffers around ``net``, this pipeline stage's layers."""

    model: DistributedDataParallel
    net: GPTModel
    optimizer: Any
    schedule: OptimizerParamScheduler
    optim: Optim
    shape: ModelShape
    groups: Any


@dataclass(frozen=True)
class LossSums:
    """Over all ranks and micro-batches, by bucket: of the losses (nats), and of the tokens that count."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a token, over all buckets; 0 where no token counts."""
        return sum(self.losses) / max(1, sum(self.tokens))

    @property
    def means(self) -> tuple[float | None, ...]:
        """The same, bucket by bucket."""
        return tuple(a / n if n else None for a, n in zip(self.losses, self.tokens, strict=True))


_RECOMPUTE: Mapping[Recompute, Mapping[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def build_train_state(
    here: Runtime,
    shape: ModelShape,
    optim: Optim,
    load: Callable[[GPTModel], None],
    *,
    dtype: torch.dtype,
    layers: str,
    steps: int,
    recompute: Recompute,
    plan: SPDPlan | None = None,
) -> TrainState:
    """A model of ``shape`` over ``here``'s mesh, its weights brought by ``load``, and its optimizer for ``steps``.

    Its blocks drop reductions as ``plan`` says, and learn with that.
    """
    assert plan is None or not plan.own_norms, "recipes refuse this"
    net = build_model(
        shape,
        here.groups,
        dtype=dtype,
        layers=layers,
        device=here.device,
        plan=plan,
        pipeline_model_parallel_size=here.mesh.pp,
        pipeline_dtype=dtype,
        batch_p2p_sync=False,
        sequence_parallel=here.mesh.sequence_parallel,
        # The token-weighted loss of any mesh is one rank's: sums are divided by the number of all tokens at the end.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **_RECOMPUTE[recompute],
    ).train()
    load(net)
    model = DistributedDataParallel(
        net.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=optim.zero1, check_for_nan_in_grad=True
        ),
        net,
    )
    net.config.no_sync_func = model.no_sync
    optimizer = get_megatron_optimizer(_optimizer_config(optim, dtype), [model])
    return TrainState(model, net, optimizer, _schedule(optimizer, optim, steps), optim, shape, here.groups)


def follow(trained: TrainState) -> None:
    """Let the settings of this run rule, not those of the checkpoint that has just been loaded."""
    optim = trained.optim
    for group in trained.optimizer.param_groups:
        group |= {"max_lr": optim.lr, "min_lr": optim.min_lr, "betas": tuple(optim.betas), "eps": optim.eps}
    trained.schedule.step(increment=0)


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
    decay = max(optim.decay_steps or steps, optim.warmup + 1)  # a run may end in its warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / max(1, optim.warmup),  # a first step at rate 0 would be none
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup,
        lr_decay_steps=decay,
        lr_decay_style=optim.decay,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        # A run that goes on follows its present settings, not those in the checkpoint (see `follow`).
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def forward_backward(
    trained: TrainState, batches: Iterable[MicroBatch], *, learn: bool = True, buckets: int = 1
) -> LossSums:
    """The sums over ``batches``, as many on every rank; with ``learn`` also the gradients of their mean."""
    batches = list(batches)
    run = get_forward_backward_func()
    rows, config = batches[0].tokens.shape[1], trained.net.config
    reports = run(
        forward_step_func=partial(_forward_step, trained, buckets),
        data_iterator=iter(batches),
        model=trained.model,
        num_microbatches=len(batches),
        seq_length=rows * config.context_parallel_size,  # from which it takes the shape that stages hand on
        micro_batch_size=1,
        forward_only=not learn,
    )
    last = torch.stack(reports).sum(0) if reports else torch.zeros(2, buckets, dtype=torch.float64)
    both = last.to(batches[0].mask.device)
    dist.all_reduce(both, group=trained.groups.dp_cp)
    dist.all_reduce(both, group=trained.groups.pp)  # only the last stage has something
    return LossSums(tuple(both[0].tolist()), tuple(int(n) for n in both[1]))


def _forward_step(
    trained: TrainState, buckets: int, batches: Any, _: MegatronModule
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    one: MicroBatch = next(batches)
    vocabulary = trained.shape.vocab_size
    out = token_losses(trained.net, one.tokens, one.targets, one.angles, one.one_pass, vocabulary)
    return out, partial(_summed, one, buckets)


def _summed(one: MicroBatch, buckets: int, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core's three: what to differentiate, how many tokens it is of, what to report."""
    counted = losses[:, 0] * one.mask
    report = torch.stack([counted.detach(), one.mask]).double()
    sums = report.new_zeros(2, buckets).index_add(1, one.bucket, report)
    return counted.sum(), one.mask.sum().int(), sums


def optimizer_step(trained: TrainState) -> tuple[float, float]:
    """Change the weights; the norm of the gradients before clipping, and the learning rate that was used."""
    rate = trained.optimizer.param_groups[0]["lr"]
    done, norm, _ = trained.optimizer.step()
    assert done, "only a scaled fp16 loss lets a step be left out"
    trained.schedule.step(increment=1)
    return float(norm), float(rate)


def clear_gradients(trained: TrainState) -> None:
    """Before the first micro-batch of a step."""
    trained.model.zero_grad_buffer()
    trained.optimizer.zero_grad()
