"""Compile the Triton kernels for GPUs, without a GPU: registers, shared memory and spills of each.

``python -m tests.attention.cubins`` writes docs/results/gpu/cubins.json and the table of docs/results/gpu/triton.md.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longctx.attention import triton_flash, triton_kernels

PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu" / "triton.md"
BEGIN, END = "<!-- the table: written by tests/attention/cubins.py -->\n", "<!-- the end of the table -->\n"
KERNELS = ("forward", "backward_q", "backward_kv", "merge")
ARCHITECTURES = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
# float16 uses what bfloat16 does.
HEAD_DIMS = {torch.bfloat16: (64, 128, 256), torch.float32: (64,)}
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compile_for(kernel: str, arch: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return registers, spills, shared memory and size of the cubin of ``kernel`` for compute capability ``arch`` / 10.

    Attention is compiled for causal tiles: it then has the loop for full tiles, and a loop for the diagonal.
    """
    q = torch.empty(1, 1024, 6, head_dim, dtype=dtype, device="meta")
    if kernel == "merge":
        options = triton_flash.merge_arguments(q, 0, q.shape[1])
    else:
        options = triton_flash.arguments(kernel, q, q[:, :, :2], causal=True) | {"INTERPRETED": False}
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    function = getattr(triton_kernels, kernel)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in options and name.isupper():
            signature[name], constants[i,] = "constexpr", options[name]
        elif name in options:
            signature[name] = "fp32" if name == "scale" else "i32"
        else:
            signature[name] = "*" + (DTYPES[dtype] if name in ("DOUT", "Q", "K", "V") else "fp32")
            attributes[i,] = [["tt.divisibility", 16]]  # torch aligns tensors
    source = ASTSource(function, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    return {
        "kernel": kernel, "architecture": ARCHITECTURES[arch], "head_dim": head_dim, "dtype": DTYPES[dtype],
        **_registers(binary.asm["ptx"], arch), "shared_bytes": binary.metadata.shared,
        "rows": options["ROWS"], "keys": options.get("KEYS"), **launch, "cubin_bytes": len(binary.asm["cubin"]),
    }  # fmt: skip


def _registers(ptx: str, arch: int) -> dict[str, int]:
    """Return the registers and the spilled bytes of a thread, as the assembler reports them."""
    assembler = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        words = [assembler.path, "-v", f"--gpu-name={target[1]}", file.name, "--output-file=/dev/null"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    figures = {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"}
    return {name: int(re.search(pattern, said)[1]) for name, pattern in figures.items()}  # type: ignore[index]


def write() -> None:
    """Compile all, and write JSON and table."""
    rows = [
        compile_for(kernel, arch, head_dim, dtype)
        for dtype, head_dims in HEAD_DIMS.items()
        for head_dim in head_dims
        for kernel in KERNELS
        for arch in ARCHITECTURES
    ]
    result = {"triton": triton.__version__, "rows": rows}
    PAGE.with_name("cubins.json").write_text(json.dumps(result, indent=1) + "\n")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table: for each architecture registers / KB of shared memory / spilled bytes."""
    lines = [
        f"| dtype | head dimension | kernel | block | warps | {' | '.join(ARCHITECTURES.values())} |",
        "|---|--:|---|---|--:|" + "--:|" * len(ARCHITECTURES),
    ]
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for kernel in KERNELS:
                key = {"dtype": DTYPES[dtype], "head_dim": head_dim, "kernel": kernel}
                cells = [row for row in rows if key.items() <= row.items()]
                first = cells[0]
                words = (f"{x['registers']} / {x['shared_bytes'] // 1024} / {x['spilled_bytes']}" for x in cells)
                keys = f" x {first['keys']}" if first["keys"] else ""
                block = f"{first['rows']}{keys} | {first['num_warps']}"
                lines.append(f"| {DTYPES[dtype]} | {head_dim} | {kernel} | {block} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write()
