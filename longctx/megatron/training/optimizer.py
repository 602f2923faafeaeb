"""Training steps with megatron-core: micro-batches through the pipeline, sums of losses, the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import GlobalMemoryBuffer

from longctx.megatron.attention import Pass
from longctx.megatron.loss import loss_of
from longctx.megatron.model import run_stage
from longctx.megatron.training.offload import Offload
from longctx.megatron.training.state import TrainState
from longctx.shapes import Float, Int, Positions, Tensor, Tokens


@dataclass(frozen=True)
class MicroBatch:
    """This rank's rows of one packed sequence, padded so that every rank has equally many.

    ``mask`` is 1 for rows whose target counts in the loss, otherwise 0 (padding included).  An evaluation sums the
    losses separately for ranges of positions, called buckets; ``bucket`` has the number of each row's bucket.  The rows
    after the first ``rows`` are padding.  ``mean_counted`` is the mean number of targets per sequence that count in the
    loss, over the whole batch.  ``offload`` takes the activations that the backward needs (None: they stay).
    """

    tokens: Tokens
    targets: Tokens
    mask: Float[Tensor, " s"]
    bucket: Positions
    attention_pass: Pass
    rows: int
    mean_counted: float
    offload: Offload | None = None


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a pass, each made by a call of one of ``makers``.

    `forward_backward` makes one when the pipeline takes it, so that only those in the pipeline are in memory.
    """

    makers: Sequence[Callable[[], MicroBatch]]

    def __len__(self) -> int:
        return len(self.makers)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (make() for make in self.makers)


@dataclass(frozen=True)
class LossSums:
    """Sums of losses (nats) and numbers of counted tokens, over all ranks and micro-batches.

    Both have one entry for each bucket: a range of positions in the documents (see `longctx.train.step.evaluate`).
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean loss (nats per token) over all buckets; 0 if no token counts."""
        return sum(self.losses) / max(1, sum(self.tokens))

    @property
    def means(self) -> tuple[float | None, ...]:
        """Mean loss (nats per token) of each bucket; None for a bucket in which no token counts."""
        return tuple(loss / n if n else None for loss, n in zip(self.losses, self.tokens, strict=True))


def forward_backward(
    train_state: TrainState, batches: MicroBatches, *, learn: bool = True, buckets: int = 1
) -> LossSums:
    """Run the micro-batches ``batches``, equally many on every rank, and return their loss sums.

    Every rank calls this, and gets the same sums.  With ``learn``, also compute the gradients of the mean loss plus the
    router loss, if there is one; call `clear_gradients` before.  Otherwise run forward only.  Losses are summed
    separately for each of ``buckets`` ranges of positions (see `MicroBatch`).
    """
    run, later = get_forward_backward_func(), iter(batches)
    first = [next(later)]
    rows, device = first[0].tokens.shape[1], first[0].mask.device
    config = train_state.net.config
    reports = run(
        forward_step_func=partial(_forward_step, train_state, buckets),
        data_iterator=chain(_emptied(first), later),
        model=train_state.model,
        num_microbatches=len(batches),
        seq_length=rows * config.context_parallel_size,  # determines the shape of tensors sent between stages
        micro_batch_size=1,
        forward_only=not learn,
    )
    # Only the last stage has reports; the others contribute zeros to the sums.
    sums = torch.stack(reports).sum(0) if reports else torch.zeros(2, buckets, dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(sums, group=train_state.groups.dp_cp)
    dist.all_reduce(sums, group=train_state.groups.pp)
    return LossSums(tuple(sums[0].tolist()), tuple(int(n) for n in sums[1]))


def _emptied(batches: list[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the first of ``batches`` until there is none, without a reference to those that were yielded."""
    while batches:
        yield batches.pop(0)


def _forward_step(
    train_state: TrainState, buckets: int, batches: Iterator[MicroBatch], _: MegatronModule
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run the next micro-batch; return the stage's output and the function that megatron-core applies to the loss."""
    batch, net = next(batches), train_state.net
    with _balanced(train_state, batch), batch.offload.active() if batch.offload else nullcontext():
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
    this.  The result is the mean loss of the batch's targets plus the mean router loss of its sequences.
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
    """Return the mean router loss of all sequences since the last call, before its coefficient is applied.

    It is None for a model without a router loss.  Every rank calls this.
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

    The report has two rows (float64): the sum of losses of each bucket, and its number of counted tokens (see
    `LossSums`).
    """
    report = torch.stack([losses * batch.mask, batch.mask]).double()
    sums = report.new_zeros(2, buckets).index_add(1, batch.bucket, report)
    return loss, batch.mask.sum().int(), sums


def optimizer_step(train_state: TrainState) -> tuple[float, float]:
    """Update the weights and advance the schedule; return the gradient norm before clipping and this step's rate.

    The norm covers all ranks' gradients, even without clipping; it is NaN or infinite if a gradient is.
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


def gather_buffers() -> list[Tensor]:
    """Return megatron-core's buffers of rows gathered from tensor-parallel ranks, which it never frees."""
    return list(get_global_memory_buffer().buffer.values())


# For a `MemoryMeter`: what an update allocates, and megatron-core's buffer of rows gathered from tensor-parallel ranks.
ALLOCATORS = {"optimizer": (optimizer_step,), "communication": (GlobalMemoryBuffer.get_tensor,)}
