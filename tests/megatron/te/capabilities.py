"""The table of docs/results/gpu/capabilities.md: kernel x layers x dtype, and how each is checked.

``pytest tests/megatron/te --write-table`` writes it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.attention import triton_flash
from longctx.attention.backends import KERNELS
from longctx.attention.kernel import Kernel
from longctx.attention.verify import refuse_inexact
from tests import oracle
from tests.attention.simulated_ops import simulated

PAGE = Path(__file__).parents[3] / "docs" / "results" / "gpu" / "capabilities.md"
BEGIN, END = "<!-- table: pytest tests/megatron/te --write-table -->\n", "<!-- end of the table -->\n"
DTYPES = ("float64", "float32", "bfloat16", "float16")
MODEL_DTYPES = DTYPES[:3]  # model.dtype, and float64 in tests
PASSES = ("forward", "backward")
ALONE = "none"  # the kernel without a model
# Largest relative error of a model's loss and of each tensor's gradient, against local layers in float64.
BOUNDS = {"float64": (1e-12, 1e-12), "float32": (1e-6, 1e-5), "bfloat16": (4e-3, 6e-2)}


@contextmanager
def kernel_on_cpu(name: str) -> Iterator[Kernel]:
    """Yield kernel ``name``, or what runs in its place on a CPU: Triton's interpreter, or simulated ops."""
    if name == "triton":
        yield triton_flash.interpreted
    elif "cpu" in KERNELS[name].devices:
        yield KERNELS[name]
    else:
        with simulated(name) as kernel:
            yield replace(kernel, devices=("cpu",))


def how_checked(name: str) -> str:
    if name == "triton":
        return "interpreter"
    return "float64" if "cpu" in KERNELS[name].devices else "simulated"


def dtypes_of(name: str) -> list[str]:
    return [dtype for dtype in DTYPES if getattr(torch, dtype) in KERNELS[name].dtypes]


def kernels_here() -> list[str]:
    """Kernels that can be checked here; without the package triton, all but its own."""
    return [name for name in KERNELS if name != "triton" or triton_flash.installed]


def passes_alone(name: str, dtype: str) -> list[str]:
    """Return the passes of kernel ``name`` that agree with float64; the simulated and CPU kernels raise otherwise."""
    with kernel_on_cpu(name) as kernel:
        if name == "triton":
            return _passes_interpreted(kernel, getattr(torch, dtype))
        refuse_inexact(kernel, torch.device("cpu"), getattr(torch, dtype), head_dim=24)
        return list(PASSES)


def _passes_interpreted(kernel: Kernel, dtype: torch.dtype) -> list[str]:
    """Return the passes that agree with float64 on one small tile, since interpreting is slow."""
    generator = torch.Generator().manual_seed(5)
    q, k, v, dout = (torch.randn(1, 29, heads, 16, generator=generator).to(dtype) for heads in (2, 1, 1, 2))
    mask = oracle.visible(oracle.pack_rows([29]), oracle.pack_rows([29]))
    part = kernel.forward(q, k, v, True)
    gradients = kernel.backward(dout, q, k, v, part.out, part.lse, True)
    errors = (
        _largest_error([part.out], oracle.attention(q, k, v, mask)[:1]),
        _largest_error(gradients, oracle.gradients(q, k, v, mask, dout)),
    )
    bound = max(1e-6, torch.finfo(dtype).eps / 2)
    return [word for word, error in zip(PASSES, errors, strict=True) if error <= bound]


def _largest_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True))


def passes_in_a_model(errors: Mapping[str, float], dtype: str) -> list[str]:
    found = zip(PASSES, (errors["loss"], errors["gradient"]), BOUNDS[dtype], strict=True)
    return [word for word, error, bound in found if error <= bound]


def lines_of(name: str, errors: Mapping[tuple[str, str, str], Mapping[str, float]]) -> list[str]:
    """Return the lines of kernel ``name``; ``errors`` are those of `ranks.run_kernels`."""
    passes = {dtype: passes_alone(name, dtype) for dtype in dtypes_of(name)}
    lines = [_line(name, ALONE, passes)]
    for layers in ("local", "te"):
        tried = [dtype for dtype in MODEL_DTYPES if (name, layers, dtype) in errors]
        passes = {dtype: passes_in_a_model(errors[name, layers, dtype], dtype) for dtype in tried}
        lines.append(_line(name, layers, passes))
    return lines


def _line(name: str, layers: str, passes: Mapping[str, list[str]]) -> str:
    cells = [f"{', '.join(passes[dtype])}: {how_checked(name)}" if passes.get(dtype) else "-" for dtype in DTYPES]
    return f"| {name} | {layers} | {' | '.join(cells)} | {_on_gpu(name) if layers == ALONE else 'not run'} |"


def _on_gpu(name: str) -> str:
    """Return the verdict of a gpu_check that was run on a GPU and is part of the results, or "not run"."""
    for file in sorted(PAGE.parent.rglob("gpu_check.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        for row in result["parts"].get("kernels", {}).get("rows", []):
            if result["device"] == "cuda" and row["kernel"] == name and row["verdict"] == "exact":
                return f"{row['dtype']}: float64 on {result['machine']['gpus'][0]}"
    return "not run"


def table(errors: Mapping[tuple[str, str, str], Mapping[str, float]]) -> dict[str, list[str]]:
    """Return the lines by kernel, those of the header under an empty name."""
    header = [
        f"| kernel | layers | {' | '.join(DTYPES)} | on a GPU |",
        "|---" * (len(DTYPES) + 3) + "|",
    ]
    return {"": header, **{name: lines_of(name, errors) for name in kernels_here()}}
