"""Parts of the check of a GPU that run a model: logits, dropped reductions, a training step, prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch

from longctx.attention.backends import KERNELS
from longctx.attention.layout import contiguous, zigzag
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.ring import pass_kv
from longctx.spd.plan import SPDPlan
from recipes.bench.gpu_parts import TableRow, device_seconds, kernel_of

if TYPE_CHECKING:
    from longctx.data.batches import Batch
    from longctx.infer.cache import KVCache
    from longctx.infer.engine import Engine
    from longctx.infer.turn import Turn
    from longctx.megatron.runtime import Runtime
    from longctx.train.step import StepResult
    from recipes.bench.gpu_check import GpuCheckJob

_LAYERS = 2  # number of first layers of the model whose results are compared with the CPU's
_RANKS = 2  # tensor-parallel ranks of the part with dropped reductions
_CPU = torch.device("cpu")


def check_logits(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Compare logits of the model's first layers: on this device in the model's dtype, and on the CPU in float32.

    The weights are random.  The only row's ``error`` is the largest difference over the largest logit.
    """
    error = _difference(_logits(job, runtime), _logits(job, runtime, on_cpu=True))
    return [
        {"tokens": job.settings.logits, "model_layers": _LAYERS, "layers": _layers(job), "error": error},
    ]


def check_dropped(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Compare logits as `check_logits` does, if one block, and if all blocks, drop a reduction over `_RANKS` ranks.

    This device, with megatron-core's layers (``model.layers=local``), computes the partial outputs of all ranks, and so
    does the CPU.  ``error`` is the difference between the two.  ``change`` is the difference that the dropped
    reductions make on the CPU.
    """
    whole, table_rows = _logits(job, runtime, on_cpu=True), []
    for dropped in ((0,), tuple(range(_LAYERS))):
        expected = _logits(job, runtime, dropped, on_cpu=True)
        table_rows.append(
            {
                "tokens": job.settings.logits,
                "ranks": _RANKS,
                "dropped": f"{len(dropped)} of {_LAYERS} blocks",
                "change": _difference(expected, whole),
                "error": _difference(_logits(job, runtime, dropped), expected),
            }
        )
    return table_rows


def check_training(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Time training steps of the model's first layers; return a row for each kind of layers, and one with ``offload``.

    A row has the first step's loss and gradient norm, with their relative errors from the CPU's step in float32, and
    the median time of the later steps.  Offload to the host must change neither: its row has the same layers as one
    without.
    """
    from longctx.megatron.training.offload import HOST

    batch = _random_batch(job)
    expected = _cpu_loss_and_norm(job, runtime, batch)
    variants = dict.fromkeys([(_layers(job), None), ("local", None), ("local", HOST)])
    return [_train(job, runtime, batch, expected, *variant) for variant in variants]


def _train(
    job: GpuCheckJob, runtime: Runtime, batch: Batch, expected: tuple[float, float], layers: str, offload: str | None
) -> TableRow:
    """Run training steps on ``batch``; return a row that compares the first one with the loss and norm ``expected``."""
    from longctx.config import Optim
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.hf_io.load import load
    from longctx.megatron.training.offload import open_offload
    from longctx.megatron.training.state import build_train_state
    from longctx.train.step import ContextParallel, train_step

    shape = job.target.shape.first(_LAYERS)
    state = build_train_state(
        runtime, shape, Optim(), lambda net: load(net, RandomInit(shape, 0), shape),
        dtype=job.dtype, layers=layers, steps=job.settings.rounds + 1, recompute="none",
    )  # fmt: skip
    hooks = open_offload(offload, state.net.parameters(), runtime.device)
    parallelism = ContextParallel(job.settings.logits, "zigzag", kernel_of(job, runtime), pass_kv, offload=hooks)
    steps: list[StepResult] = []
    seconds = [
        device_seconds(lambda: steps.append(train_step(state, batch, runtime, parallelism)))
        for _ in range(job.settings.rounds + 1)
    ]
    step_s, (loss, norm) = median(seconds[1:]), expected
    return {
        "tokens": job.settings.logits,
        "model_layers": _LAYERS,
        "layers": layers,
        "offload": offload,
        "offloaded_bytes": hooks.peak if hooks else 0,
        "loss": steps[0].loss,
        "grad_norm": steps[0].grad_norm,
        "error_loss": abs(steps[0].loss / loss - 1),
        "error_grad_norm": abs(steps[0].grad_norm / norm - 1),
        "step_s": step_s,
        "tokens_per_s": job.settings.logits / step_s,
    }


def time_model(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Prefill random tokens with a model of random weights, then decode; return seconds and tokens/s.

    There is a row for each prompt length.  A first prompt, of the shortest length, has no row: it takes the time of all
    first calls.  ``peak_bytes`` is the peak on the GPU during this row, with the model and
    what the rows before left there; None on a CPU.
    """
    from longctx.config import Context, Sampling
    from longctx.infer.session import Session

    engine, table_rows = _random_engine(job, runtime), list[TableRow]()

    def answer(length: int) -> Turn:
        context, prompts = Context(chunk=job.target.context.chunk), {0: _random_tokens(job, length).tolist()}
        return Session(engine, context, Sampling()).turn(prompts, {0: job.settings.new_tokens})

    answer(min(job.settings.prefill))
    for length in job.settings.prefill:
        _reset_peak(runtime.device)
        turn = answer(length)
        table_rows.append(
            {
                "tokens": length,
                "ttft_s": turn.ttft_s,
                "prefill_tokens_per_s": length / turn.ttft_s,
                "ttit_s": turn.ttit_s,
                "peak_bytes": _peak_bytes(runtime.device),
            }
        )
    return table_rows


def time_decode(job: GpuCheckJob, runtime: Runtime) -> list[TableRow]:
    """Decode the same tokens with a growing cache, with tensors of fixed shapes, and as a CUDA graph of these.

    There is a row for each way; without a GPU, the graph's row has no figures.  ``error`` is the largest difference of
    the last logits from those of the growing cache, over the largest logit.
    """
    from longctx.infer.engine import next_logits
    from longctx.infer.fixed_step import FixedStep
    from longctx.infer.prefill import run_pass, run_replicated

    engine, tokens = _random_engine(job, runtime), _random_tokens(job, min(job.settings.prefill))
    room = len(tokens) + job.settings.new_tokens

    def prefilled() -> KVCache:
        cache = engine.cache(room)
        run_pass(engine, tokens, zigzag(len(tokens), 1), cache, engine.everywhere(pass_kv))
        return cache

    growing = prefilled()

    def grow(token: int) -> torch.Tensor:
        hidden = run_replicated(engine, torch.tensor([token]), contiguous(1, 1), growing)
        return next_logits(engine, hidden)[0, 0]

    variants: dict[str, Callable[[int], torch.Tensor]] = {
        "growing cache": grow,
        "fixed shapes": FixedStep(engine, prefilled(), room),
    }
    if runtime.device.type == "cuda":
        graphed = FixedStep(engine, prefilled(), room)
        graphed.capture()
        variants["CUDA graph"] = graphed
    table_rows: list[TableRow] = []
    expected = None
    for name, step in variants.items():
        seconds, logits = _run_steps(step, job.settings.new_tokens)
        expected = logits if expected is None else expected
        table_rows.append(_decode_row(name, len(tokens), seconds, _difference(logits, expected)))
    if "CUDA graph" not in variants:
        table_rows.append({**dict.fromkeys(table_rows[0], "-"), "variant": "CUDA graph: left out, needs device=cuda"})
    return table_rows


def _run_steps(step: Callable[[int], torch.Tensor], count: int) -> tuple[list[float], torch.Tensor]:
    """Feed the tokens 0 to ``count - 1`` to ``step``; return the seconds of each step, and the last logits."""
    logits: list[torch.Tensor] = []
    seconds = [device_seconds(lambda: logits.append(step(len(logits)).clone())) for _ in range(count)]
    return seconds, logits[-1]


def _decode_row(variant: str, tokens: int, seconds: Sequence[float], error: float) -> TableRow:
    step_s = median(seconds)
    return {"variant": variant, "tokens": tokens, "step_s": step_s, "tokens_per_s": 1 / step_s, "error": error}


def _layers(job: GpuCheckJob) -> str:
    from longctx.megatron.model import layers_in_use

    return layers_in_use(job.target.model.layers, job.target.shape)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _logits(job: GpuCheckJob, runtime: Runtime, dropped: tuple[int, ...] = (), *, on_cpu: bool = False) -> torch.Tensor:
    """Return the logits of ``settings.logits`` tokens by the model's first `_LAYERS` layers, with random weights.

    The weights have seed 0.  The logits are computed in the model's dtype on the runtime's device, or in float32 with
    ``on_cpu``.  The blocks ``dropped`` drop their first reduction over `_RANKS` ranks, all of which this rank computes.
    """
    from longctx.infer.engine import Engine, next_logits
    from longctx.infer.prefill import run_pass
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.hf_io.load import load
    from longctx.megatron.model import build_model
    from longctx.megatron.sharded import share_weights

    shape, tokens = job.target.shape.first(_LAYERS), _counted_tokens(job)
    dtype, device, kernel = job.dtype, runtime.device, kernel_of(job, runtime)
    if on_cpu:
        dtype, device, kernel = torch.float32, _CPU, KERNELS["flash_cpu"]
    layers = "local" if on_cpu or dropped else _layers(job)
    plan = SPDPlan(_LAYERS, _RANKS, dropped) if dropped else None
    net = build_model(shape, runtime.groups, dtype=dtype, layers=layers, device=device, plan=plan)
    load(net, RandomInit(shape, 0), shape)
    if dropped:
        share_weights(net, shape, SingleRankComm(0, _RANKS), SingleRankComm(0, _RANKS))
    engine = Engine(net, shape, kernel, layers=layers)
    cache, everywhere = engine.cache(len(tokens)), engine.everywhere(pass_kv)
    return next_logits(engine, run_pass(engine, tokens, zigzag(len(tokens), 1), cache, everywhere)).cpu()


def _counted_tokens(job: GpuCheckJob) -> torch.Tensor:
    return torch.arange(job.settings.logits) % job.target.shape.vocab_size


def _random_tokens(job: GpuCheckJob, length: int) -> torch.Tensor:
    return torch.randint(job.target.shape.vocab_size, (length,))


def _random_batch(job: GpuCheckJob) -> Batch:
    """Return a batch of one sequence: the tokens 0, 1, 2, ... (``settings.logits`` of them), cut into two documents."""
    from longctx.data.batches import Batch

    n = job.settings.logits
    tokens = _counted_tokens(job).unsqueeze(0)
    return Batch(tokens, tokens.roll(-1, 1), torch.ones(1, n, dtype=torch.bool), ((n // 3, n - n // 3),), n)


def _cpu_loss_and_norm(job: GpuCheckJob, runtime: Runtime, batch: Batch) -> tuple[float, float]:
    """Return the mean loss of ``batch`` and the norm of all gradients, on the CPU in float32.

    The model is the first `_LAYERS` layers of the job's model, with random weights of seed 0.
    """
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.hf_io.load import load
    from longctx.megatron.loss import loss_of
    from longctx.megatron.model import build_model, run_stage
    from longctx.train.step import ContextParallel, micro_batches

    shape = job.target.shape.first(_LAYERS)
    net = build_model(shape, runtime.groups, dtype=torch.float32, layers="local", device=_CPU).train()
    load(net, RandomInit(shape, 0), shape)
    parallelism = ContextParallel(job.settings.logits, "zigzag", KERNELS["flash_cpu"], pass_kv)
    (micro,) = micro_batches(batch, replace(runtime, device=_CPU), shape, parallelism)
    hidden = run_stage(net, micro.tokens, micro.attention_pass)
    loss = loss_of(net, hidden, micro.targets[0], micro.mask, runtime.tp, shape)[0] / batch.counted
    loss.backward()
    norms = [weight.grad.norm() for weight in net.parameters() if weight.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


def _random_engine(job: GpuCheckJob, runtime: Runtime) -> Engine:
    """Return an engine of the job's whole model with random weights, drawn on the runtime's device."""
    from longctx.infer.engine import Engine
    from longctx.megatron.model import build_model

    shape, layers = job.target.shape, _layers(job)
    net = build_model(shape, runtime.groups, dtype=job.dtype, layers=layers, device=runtime.device)
    with torch.no_grad():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=shape.init_std) if weight.dim() > 1 else torch.nn.init.ones_(weight)
    return Engine(net, shape, kernel_of(job, runtime), layers=layers)


def _reset_peak(device: torch.device) -> None:
    """Let `_peak_bytes` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes of tensors that existed at once on a GPU since `_reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
