"""A large model on the device meta: shapes pass through Transformer Engine's layers, without memory.

A tensor on the CPU, or a value that is read on the host, raises there.
"""

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from longctx.attention.flash_cuda import flash_cuda
from longctx.attention.layout import contiguous, zigzag
from longctx.config import Mesh
from longctx.hf.config import shape_of
from longctx.infer import prefill
from longctx.infer.engine import Engine, next_logits
from longctx.megatron import te_modules
from longctx.megatron.attention import rotary_tables
from longctx.megatron.model import build_model, run_stage
from longctx.megatron.runtime import Runtime, open_runtime
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.ring import pass_kv
from longctx.train.step import ContextParallel, micro_batches
from tests.train.ranks import Run, sequences

META, KERNEL = torch.device("meta"), replace(flash_cuda, devices=("meta",))
LENGTH = 61  # tokens of a training sequence


def run_on_meta(rank: Rank, folder: Path, prompt: int) -> dict[str, Any]:
    """Run the model of ``folder``: ``prompt`` tokens, a decoded token, and a training pass of two sequences.

    Returns the shapes of ``passes``, the number of wrong ``gradients``, the ``weights``' and the process's ``bytes``,
    and for each mistake whether it is ``noticed``.
    """
    shape, before = shape_of(folder), _peak_bytes()
    with open_runtime(rank, Mesh(), timeout_minutes=2) as runtime:
        net = _model(runtime, shape)
        results = {
            "passes": _infer(net, shape, prompt),
            "gradients": _train(net, shape, replace(runtime, device=META), folder),
            "weights": sum(weight.numel() * weight.itemsize for weight in net.parameters()),
            "bytes": _peak_bytes() - before,
        }
        small = shape.first(2)
        net = _model(runtime, small)
        return {
            **results,
            "noticed": {name: _notices(net, small, prompt, mistake) for name, mistake in MISTAKES.items()},
        }


def _model(runtime: Runtime, shape: ModelShape) -> Any:
    return build_model(shape, runtime.groups, dtype=torch.bfloat16, layers="te", device=META)


def _infer(net: Any, shape: ModelShape, prompt: int) -> dict[str, tuple[int, ...]]:
    engine = Engine(net, shape, KERNEL, layers="te")
    cache, everywhere = engine.cache(prompt + 1), engine.everywhere(pass_kv)
    hidden = prefill.run_pass(engine, torch.zeros(prompt, dtype=torch.long), zigzag(prompt, 1), cache, everywhere)
    step = prefill.run_replicated(engine, torch.zeros(1, dtype=torch.long), contiguous(1, 1), cache)
    cached = cache.layer(shape.layers - 1)[0]
    tensors = {"prompt": hidden, "logits": next_logits(engine, hidden[-1:]), "token": step, "cached": cached}
    assert {x.device for x in tensors.values()} == {META}
    return {name: tuple(x.shape) for name, x in tensors.items()}


def _train(net: Any, shape: ModelShape, runtime: Runtime, folder: Path) -> int:
    """Return how many weights have no gradient of their shape after a backward pass from the final hidden states."""
    batch = sequences(Run(runtime.mesh, folder, ((13, 0, 46, 2), (5, 56)), tokens=211), 0)
    net.train()
    for micro in micro_batches(batch, runtime, shape, ContextParallel(LENGTH, "zigzag", KERNEL, pass_kv)):
        hidden = run_stage(net, micro.tokens, micro.attention_pass)
        with patch("transformer_engine.pytorch.utils._empty_tensor", lambda: torch.empty(0, device=META)):
            hidden.float().sum().backward()  # the loss selects rows by value, which the device meta cannot
    weights = [weight for name, weight in net.named_parameters() if "output_layer" not in name]
    return sum(weight.grad is None or weight.grad.shape != weight.shape for weight in weights)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _notices(net: Any, shape: ModelShape, prompt: int, mistake: Callable[[], AbstractContextManager[Any]]) -> bool:
    expected = _infer(net, shape, prompt)
    with mistake():
        try:
            return _infer(net, shape, prompt) != expected
        except (RuntimeError, AssertionError):
            return True


def _tables_on_cpu(shape: ModelShape, positions: Tensor, dtype: torch.dtype) -> Any:
    return rotary_tables(shape, torch.arange(len(positions)), dtype)


def _changed_output(change: Callable[[Tensor], Any]) -> AbstractContextManager[Any]:
    forward = te_modules.TERowLinear.forward
    return patch.object(te_modules.TERowLinear, "forward", lambda self, x: (change(forward(self, x)[0]), None))


MISTAKES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "rotary tables on the CPU": lambda: patch.object(prefill, "rotary_tables", _tables_on_cpu),
    "a value read on the host": lambda: _changed_output(lambda x: x * float(x.abs().max())),
    "rows and sequences exchanged": lambda: _changed_output(lambda x: x.transpose(0, 1)),
}
