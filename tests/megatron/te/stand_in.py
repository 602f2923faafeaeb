"""Transformer Engine on CPU: its pure Python wheel, with the functions of its C++ extension that we need in torch.

Parameters, autograd functions, parallel modes and collectives are Transformer Engine's own.  GEMM and norms are
torch's, so nothing here says anything about kernels.
"""

import enum
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.megatron.te import fp8_stand_in

# Enumerations whose members Transformer Engine lists or converts to integers: in the order of its headers.
_MEMBERS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "FP8FwdTensors": " ".join(f"GEMM{i}_{x}" for i in (1, 2, 3) for x in ("INPUT", "WEIGHT", "OUTPUT")),
    "FP8BwdTensors": " ".join(f"GRAD_{x}{i}" for i in (1, 2, 3) for x in ("OUTPUT", "INPUT")),
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
}


class _Mock(types.ModuleType):
    """A module that has every name."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return self.__dict__[name]


class _AnyMember(type):
    """A class that has every attribute, each one another integer."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__dict__))
        return cls.__dict__[name]


class _Extension(_Mock):
    """The C++ extension: mocks, but for the functions of this module and the enumerations."""

    def __getattr__(self, name: str) -> Any:
        if name in _MEMBERS:
            setattr(self, name, enum.IntEnum(name, _MEMBERS[name].split(), start=0))
        elif name[0].isupper():
            setattr(self, name, _AnyMember(name, (), {"__init__": lambda self, *_, **__: None}))
        else:
            return super().__getattr__(name)
        return self.__dict__[name]


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds mocks of packages that Transformer Engine imports, if they are not installed."""

    names = tuple(name for name in ("onnx", "onnxscript", "triton") if importlib.util.find_spec(name) is None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Mock(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _generic_gemm(
    a: Tensor, a_turned: bool, b: Tensor, b_turned: bool, out: Tensor | None, quantizer: None, dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: None, grad: bool, workspace: Any, size: int,
    accumulate: bool, split: bool, **options: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """Return B A in cuBLAS' sense: rows of ``b`` times ``a``, either of them transposed."""
    assert quantizer is None and not gelu and options["alpha"] == 1 and not options["bulk_overlap"]
    rounded = [fp8_stand_in.is_rounded(x) for x in (a, b)]
    assert rounded[0] == rounded[1], "a product of 8-bit and other numbers"
    a, b = fp8_stand_in.values_of(a, columnwise=not a_turned), fp8_stand_in.values_of(b, columnwise=b_turned)
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    y = (rows_b.T if b_turned else rows_b) @ (rows_a.T if a_turned else rows_a)
    if any(rounded):
        y = y.to({"kInt32": torch.float64, "kBFloat16": torch.bfloat16}[dtype.name])
        assert not any(size % 16 for size in (*rows_a.shape, *rows_b.shape)), (rows_a.shape, rows_b.shape)
    bias_gradient = rows_b.sum(0) if bias is not None and grad else None
    if bias is not None and not grad:
        y = y + bias
    if not b_turned:
        y = y.reshape(*b.shape[:-1], y.shape[-1])
    if out is not None:
        y = out.copy_(out + y if accumulate else y)
    return y, bias_gradient, None, None


def _rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, *rest: Any) -> tuple[Any, None, Tensor]:
    _, quantizer, *_, zero_centered = rest
    weight = 1 + weight if zero_centered else weight
    out = F.rms_norm(x, weight.shape, weight, eps)
    return quantizer(out) if quantizer else out, None, (x.square().mean(-1) + eps).rsqrt()


def _rmsnorm_bwd(dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, _: int, centered: bool) -> tuple[Tensor, ...]:
    dy = dy.reshape(x.shape)
    normed, g = x * rsigma[:, None], dy * (1 + weight if centered else weight)
    return rsigma[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True)), (dy * normed).sum(0)


def _layernorm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *rest: Any) -> tuple[Any, Tensor, Tensor]:
    _, quantizer, *_, zero_centered = rest
    assert not zero_centered, "no known model has a zero-centered LayerNorm"
    rsigma = (x.var(-1, correction=0) + eps).rsqrt()
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    return quantizer(out) if quantizer else out, x.mean(-1), rsigma


def _layernorm_bwd(dy: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dy = dy.reshape(x.shape)
    normed, g = (x - mean[:, None]) * rsigma[:, None], dy * weight
    dx = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    return rsigma[:, None] * dx, (dy * normed).sum(0), dy.sum(0)


def install(folder: Path) -> None:
    """Make the wheel unpacked in ``folder`` importable; call it before megatron-core is imported."""
    import torch._dynamo  # before the mocks, since it asks once whether there is Triton  # noqa: F401

    sys.path.append(str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then loads no shared library
    extension = _Extension("transformer_engine_torch")
    extension.__spec__ = ModuleSpec("transformer_engine_torch", None)
    extension.get_cudnn_version = lambda: 92400
    for function in (_generic_gemm, _rmsnorm_fwd, _rmsnorm_bwd, _layernorm_fwd, _layernorm_bwd):
        setattr(extension, function.__name__[1:], function)
    fp8_stand_in.add_functions(extension)
    sys.modules["transformer_engine_torch"] = extension
    # The package's own __init__ refuses to be imported without its core.
    spec = importlib.util.find_spec("transformer_engine")
    package: Any = types.ModuleType("transformer_engine")
    package.__path__, package.__spec__, package.__file__ = [*spec.submodule_search_locations], spec, spec.origin
    package.__version__ = importlib.metadata.version("transformer_engine")
    sys.modules["transformer_engine"] = package
    finder = _Absent()
    sys.meta_path.append(finder)
    package.common = importlib.import_module("transformer_engine.common")
    package.common.load_framework_extension = lambda framework: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] in finder.names]:
        del sys.modules[name]
    # Without these, megatron-core takes torch's optimizers, as it does on CPU.
    sys.modules["transformer_engine.pytorch.optimizers"] = types.ModuleType("transformer_engine.pytorch.optimizers")
    _take_cpu_tensors()
    fp8_stand_in.claim_support()


def _take_cpu_tensors() -> None:
    """Make modules constructible and callable on CPU tensors, of float64 too."""
    from transformer_engine.pytorch import constants, utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import base

    module = base.TransformerEngineBaseModule
    construct = module.__init__

    def construct_anywhere(self: Any, *args: Any, **kwargs: Any) -> None:
        with patch.object(torch.cuda, "is_available", lambda: True):
            construct(self, *args, **kwargs)

    def prepare_forward(
        self: Any, x: Tensor, num_gemms: int = 1, allow_non_contiguous: bool = False, *_: Any, **__: Any
    ) -> Tensor:
        assert self.tp_size == 1 or self.tp_group_initialized
        self.set_activation_dtype(x)
        self.init_fp8_metadata(num_gemms=num_gemms)
        self._check_weight_tensor_recipe_correspondence()
        return x if allow_non_contiguous else x.contiguous()

    module.__init__, module.prepare_forward = construct_anywhere, prepare_forward
    module.allow_different_data_and_param_types = False
    constants.TE_DType[torch.float64] = constants.DType.kInt32  # passed to the extension only; it has no such dtype
    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    for each in [each for name, each in sys.modules.items() if name.startswith(utils.__package__)]:
        if hasattr(each, "_empty_tensor"):
            each._empty_tensor = torch.Tensor
    torch.cuda.is_current_stream_capturing = lambda: False
