"""megatron-core's training machinery where there is no CUDA: torch is told that its CUDA device is the CPU.

megatron-core's source is not patched; functions of torch.cuda are replaced in this process.  Its schedules,
optimizers and checkpoints name the device "cuda" in calls that no setting reaches; inference needs none of them, and
runs without this.
"""

import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _means_cuda(device: Any) -> bool:
    return type(device) is int or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _CudaIsTheCpu(TorchFunctionMode):
    """Tensors that are asked for on CUDA come on the CPU.

    Inside ``backward`` no mode is active; what megatron-core does there needs the functions below alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        given = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(given, str):
            # The optimizers sort parameters by this word.
            return given.replace("torch.", "torch.cuda.", 1)
        return given


class _Event:
    """torch.cuda.Event, of a device on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


_active: list[_CudaIsTheCpu] = []


def let_training_run() -> None:
    """Make this process able to train with megatron-core; nothing happens where there is CUDA.  Call once or often."""
    if torch.cuda.is_available() or _active:
        return
    nothing = {"synchronize": None, "set_device": None, "empty_cache": None, "manual_seed": None}
    for name in nothing:
        setattr(torch.cuda, name, lambda *_, **__: None)
    setattr(torch.cuda, "current_device", lambda: _CPU)  # noqa: B010
    setattr(torch.cuda, "Event", _Event)  # noqa: B010
    setattr(torch.cuda.nvtx, "_nvtx", types.SimpleNamespace(rangePushA=lambda _: 0, rangePop=lambda: 0))  # noqa: B010
    # Activation checkpointing saves and restores the generator that a GPU would draw from.
    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", lambda *_, **__: torch.get_rng_state())  # noqa: B010
        setattr(module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))  # noqa: B010
    _active.append(_CudaIsTheCpu())
    _active[0].__enter__()
