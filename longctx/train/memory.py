"""Allocated bytes of a training step, by the parts that `longctx.cost.memory` predicts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from longctx.megatron.training import optimizer
from longctx.megatron.training.state import TrainState
from longctx.parallel import cross_entropy, dist_comm
from longctx.parallel.measure.memory import MemoryMeter
from longctx.shapes import AnyShape


def memory_meter(state: TrainState) -> MemoryMeter:
    """Return a meter of training steps of ``state``, which the caller runs inside ``with meter``.

    The parts "weights" and "gradients" are those that ``state`` has already.  The other parts are

    * "logits": a chunk of logits, and the loss's gradients of the hidden states and of the output weight.
    * "communication": messages of a `Comm` while they exist, and megatron-core's buffer of gathered rows, which stays.
    * "optimizer": float32 weights and moments, and what an update allocates.
    * "activations": all else, such as the gradients of activations and of single weights.

    In a run's first step, the optimizer's moments do not exist until the update.
    """
    meter = MemoryMeter(
        {
            "logits": cross_entropy.ALLOCATORS,
            "optimizer": optimizer.ALLOCATORS["optimizer"],
            "communication": (*dist_comm.ALLOCATORS, *optimizer.ALLOCATORS["communication"]),
        }
    )
    meter.hold("weights", state.net.parameters())
    meter.hold("gradients", [buffer.grad_data for buffer in state.model.buffers + state.model.expert_parallel_buffers])
    meter.hold("communication", optimizer.gather_buffers())
    meter.hold("optimizer", _optimizer_tensors(state.optimizer))
    return meter


def _optimizer_tensors(state: Any) -> Iterator[AnyShape]:
    """Yield the weights that the optimizer updates, float32 copies if the model is in 16 bits, and the moments."""
    for group in state.param_groups:
        yield from group["params"]
    moments = tree_leaves([moments for _, moments in state.state.items()])
    yield from (x for x in moments if isinstance(x, torch.Tensor))
