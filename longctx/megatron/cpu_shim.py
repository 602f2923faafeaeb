"""megatron-core's training code on machines without CUDA: torch calls that name CUDA run on the CPU.

megatron-core's schedules, optimizers and checkpoints hard-code the device "cuda".  Its source is not patched; functions
of `torch.cuda` are replaced in this process instead.  Inference needs no replacement.
"""

import importlib
import types
from typing import Any

import torch
from megatron.core import utils as megatron_utils
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_REDIRECTED = {torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type}


def _is_cuda(device: Any) -> bool:
    return type(device) is int or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _CudaToCpu(TorchFunctionMode):
    """Redirect tensors requested on a CUDA device to the CPU.

    The mode is inactive inside ``backward``.  There megatron-core needs only the functions that `let_training_run`
    replaces.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every operation passes here, and few have anything to redirect.
        kwargs = kwargs or {}
        if "device" in kwargs or "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
        if func not in _REDIRECTED:
            return func(*args, **kwargs)
        if func is torch.Tensor.type:
            result = func(*args, **kwargs)
            # The optimizers group parameters by this type name and expect a CUDA type.
            return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result
        if func is torch.Tensor.to:
            if len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], _CPU, *args[2:])
            return func(*args, **kwargs)
        return args[0]  # Tensor.cuda and Tensor.pin_memory


class _Event:
    """A `torch.cuda.Event` without effect, since operations on the CPU are synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


_active: list[_CudaToCpu] = []


def let_training_run() -> None:
    """Replace functions of `torch.cuda` so that megatron-core can train in this process without CUDA.

    Until the process ends, tensors requested on a CUDA device are also made on the CPU, and megatron-core uses torch's
    optimizers.  Does nothing if CUDA is available or if the functions are replaced already.
    """
    if torch.cuda.is_available() or _active:
        return
    use_torch_optimizers()
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    setattr(torch.cuda, "current_device", lambda: _CPU)  # noqa: B010
    setattr(torch.cuda, "current_stream", lambda *_: None)  # noqa: B010  # megatron-core uses it with CUDA graphs only
    setattr(torch.cuda, "Event", _Event)  # noqa: B010
    setattr(torch.cuda.nvtx, "_nvtx", types.SimpleNamespace(rangePushA=lambda _: 0, rangePop=lambda: 0))  # noqa: B010
    # Activation checkpointing saves and restores the state of the GPU's random generator.
    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", lambda *_, **__: torch.get_rng_state())  # noqa: B010
        setattr(module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))  # noqa: B010
    _active.append(_CudaToCpu())
    _active[0].__enter__()  # type: ignore[no-untyped-call]


def use_torch_optimizers() -> None:
    """Make megatron-core use torch's optimizers, not those of Transformer Engine or Apex, which need CUDA.

    Without this call, megatron-core takes Adam and the operations on lists of tensors from one of them, if installed.
    """
    package: Any = importlib.import_module("megatron.core.optimizer")
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    optimizer: Any = importlib.import_module("megatron.core.optimizer.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")

    package.Adam, package.SGD, package.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distributed.Adam = torch.optim.Adam
    distributed.USING_TE_OPTIMIZER = distributed.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = megatron_utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = megatron_utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = megatron_utils.local_multi_tensor_l2_norm
