"""Measure the rates of one rank's layers outside attention, in inference and in training, for a hardware file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from longctx.cost.forward import layer_weights
from longctx.cost.hardware import LayerRates, Link, TrainRates

if TYPE_CHECKING:
    from longctx.megatron.attention import Pass
    from longctx.megatron.runtime import Runtime
    from longctx.model_shape import ModelShape
    from recipes.common.target import Target

LAYERS = 6  # layers to measure; one layer's weights may stay in the cache
_MOST_WEIGHTS = 2**27  # weights of the trained layers: 2 GB with gradients and the optimizer's state
_VOCABULARY = 64  # tokens of the measured model, whose embedding and head are not part of a layer
_LOGITS = 2**14  # most logits of a row of the loss
_REDUCED = 2**10, 2**24  # bytes of an all-reduce


def measure_layer(runtime: Runtime, target: Target) -> LayerRates | None:
    """Measure the rates of one rank's layers without their attention; every rank must call it.

    Runs the first `LAYERS` layers with random weights, which together do not fit in a CPU's cache.  Returns None for a
    mixture of experts, and with tensor parallelism, whose reductions would be timed as well.  Training is measured on a
    CPU, if a layer's training fits in 2 GB; ``runtime`` must be one for training.
    """
    if target.shape.mixture or target.mesh.tp > 1:
        return None
    shape, dtype = target.shape.first(min(LAYERS, target.shape.layers)), getattr(torch, target.model.dtype)
    rates = replace(_inference_rates(runtime, shape, dtype), reduce=measure_reduce(runtime))
    return replace(rates, training=measure_training(runtime, shape, dtype, rates))


def _inference_rates(runtime: Runtime, shape: ModelShape, dtype: torch.dtype) -> LayerRates:
    """Measure the layers of ``shape`` in inference."""
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import build_model, hidden_states
    from longctx.megatron.products import linear
    from longctx.parallel.measure.probe import probe_layer

    few, device = replace(shape, vocab_size=_VOCABULARY), runtime.device
    net = build_model(few, runtime.groups, dtype=dtype, layers="local", device=device)
    hf_load.load(net, RandomInit(few, seed=0), few)
    forward = _forward_of(partial(hidden_states, net), few, dtype, device)
    rates = probe_layer(runtime.world, forward, sum(layer_weights(few)) * few.layers, dtype, device, linear)
    return replace(rates, layer_s=rates.layer_s / few.layers)


def measure_training(runtime: Runtime, shape: ModelShape, dtype: torch.dtype, rates: LayerRates) -> TrainRates | None:
    """Measure a training step of the layers of ``shape`` without their attention; every rank must call it.

    ``rates`` are those of these layers in inference.  Returns None on a GPU, and if a layer has too many weights.
    """
    from longctx.config.training import Optim
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import hidden_states
    from longctx.megatron.training.optimizer import clear_gradients, optimizer_step
    from longctx.megatron.training.state import build_train_state
    from longctx.parallel.measure.probe import probe_training

    layers = min(shape.layers, int(_MOST_WEIGHTS // sum(layer_weights(shape))))
    if runtime.device.type != "cpu" or not layers:
        return None
    few = replace(shape.first(layers), vocab_size=_VOCABULARY)
    state = build_train_state(
        runtime,
        few,
        Optim(),
        lambda net: hf_load.load(net, RandomInit(few, seed=0), few),
        dtype=dtype,
        layers="local",
        steps=1000,
        recompute="none",
    )
    forward = _forward_of(partial(hidden_states, state.net), few, dtype, runtime.device)

    def update() -> None:
        clear_gradients(state)
        optimizer_step(state)

    return probe_training(
        runtime.world,
        lambda tokens: forward(tokens).sum().backward(),
        update,
        _loss_of(min(shape.vocab_size, _LOGITS), shape.hidden, dtype),
        sum(layer_weights(shape)) * layers,
        rates,
        3 * layers * rates.layer_s,
        runtime.device,
    )


class _NoAttention(torch.autograd.Function):
    """The queries in place of attention's output; keys and values get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(k, v)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k, v = ctx.saved_tensors
        return gradient, torch.zeros_like(k), torch.zeros_like(v)


def _loss_of(vocab_size: int, hidden: int, dtype: torch.dtype) -> Callable[[int], tuple[float, float]]:
    """Return a function that computes the loss of a number of rows, as `probe_training` needs it."""
    from longctx.parallel.comm import SingleRankComm
    from longctx.parallel.cross_entropy import cross_entropy

    weight = torch.ones(vocab_size, hidden, dtype=dtype).requires_grad_()

    def loss(tokens: int) -> tuple[float, float]:
        states, targets = torch.ones(tokens, hidden, dtype=dtype).requires_grad_(), torch.arange(tokens) % vocab_size
        cross_entropy(states, weight, targets, torch.ones(tokens), SingleRankComm(), vocab_size)
        return tokens * vocab_size, 6 * tokens * vocab_size * hidden

    return loss


def _forward_of(
    run: Callable[[torch.Tensor, Pass], torch.Tensor], shape: ModelShape, dtype: torch.dtype, device: torch.device
) -> Callable[[int], torch.Tensor]:
    """Return a function of a number of tokens, which gives them to ``run`` with a `Pass` without attention."""
    from longctx.megatron.attention import Pass, rotary_tables

    def forward(tokens: int) -> torch.Tensor:
        positions = torch.arange(tokens, device=device)
        one_pass = Pass(
            attend=lambda _layer, q, k, v, *_sinks: _NoAttention.apply(q, k, v),  # type: ignore[no-untyped-call]
            rotary=rotary_tables(shape, positions, dtype),
        )
        return run(positions.remainder(shape.vocab_size).unsqueeze(0), one_pass)

    return forward


def measure_reduce(runtime: Runtime) -> Link | None:
    """Measure one step of an all-reduce over the ranks that share gradients; every rank must call it.

    Returns None on a GPU, where calls return early, and if these ranks are not all ranks.  A ring of n ranks takes
    2 (n - 1) steps, each of which sends 1/n of the bytes.
    """
    import torch.distributed as dist

    from longctx.parallel.measure.probe import added_seconds

    group, ranks = runtime.groups.dp_cp, runtime.world.size
    if runtime.device.type != "cpu" or group.size() != ranks:
        return None

    def step_s(size: int) -> float:
        x = torch.ones(size // 4)
        return added_seconds(runtime.world, lambda: dist.all_reduce(x, group=group), runtime.device) / (2 * (ranks - 1))

    small, large = map(step_s, _REDUCED)
    return Link(small, (_REDUCED[1] - _REDUCED[0]) / ranks / max(large - small, 1e-9))
