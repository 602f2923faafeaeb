"""Show the hardware and libraries that longctx finds here, the settings that recipes accept, and what is missing.

python -m recipes.doctor out=doctor.json
"""

import os
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from recipes.common.cli import console, main, write_result
from recipes.common.manifest import record, refuse_other_recipe
from recipes.common.places import refuse_unwritable
from recipes.common.provenance import cores, hardware, provenance
from recipes.common.settings import top_level

RECIPE = "recipes.doctor"
# Instruction sets that torch's bfloat16 and float32 GEMMs use.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_TE_PARTS = ("transformer-engine", "transformer-engine-torch")
_GPU_KERNELS = "flash_cuda or cudnn"


@dataclass(frozen=True)
class DoctorSettings:
    """Settings of recipes.doctor; ``out`` is the file for the report (None: it is only printed)."""

    out: str | None = None


@dataclass(frozen=True)
class LocalMachine:
    """Hardware and libraries; None for a library, driver or link that is not here.

    ``cuda`` and ``nccl`` are the versions that torch was built with.  ``gpus`` are the names of those that torch can
    use, ``listed_gpus`` of those that the driver lists.  ``gpu_memory_bytes`` is that of the smallest of ``gpus``, 0
    without one.  ``links`` counts the links of each kind from the first GPU to the others.  ``te_missing`` are packages
    that an incomplete Transformer Engine lacks.
    """

    processor: str
    cores: int
    instructions: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[str, ...]
    gpu_memory_bytes: int
    listed_gpus: tuple[str, ...]
    driver: str | None
    links: str | None
    torch: str
    float32_products: str
    cuda: str | None
    nccl: str | None
    flash_attn_2: str | None
    flash_attn_4: str | None
    transformer_engine: str | None
    te_missing: tuple[str, ...]
    triton: str | None


@dataclass(frozen=True)
class AcceptedSettings:
    """Settings that recipes accept on this machine.

    ``recipes`` says which recipes; ``words`` are the settings as words to type; the other fields are the values one by
    one.
    """

    recipes: str
    words: str
    device: str
    kernel: str
    layers: str
    dtype: str


@dataclass(frozen=True)
class Missing:
    """A part that this machine lacks, what this costs (``cost``), and how to install it."""

    part: str
    cost: str
    install: str


def find_machine() -> LocalMachine:
    """Return this machine's hardware and libraries; runs nothing on a GPU."""
    import torch

    from longctx.attention.flash_attn import installed
    from longctx.onednn import is_faster

    gpus = range(torch.cuda.device_count())
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.is_file() else set()
    te = version_of("transformer-engine")
    cuda, smi = torch.version.cuda, "nvidia-smi"
    return LocalMachine(
        processor=str(hardware()["processor"]),
        cores=cores(),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(torch.cuda.get_device_name(i) for i in gpus),
        gpu_memory_bytes=min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=0),
        listed_gpus=tuple(_run(smi, "--query-gpu=name", "--format=csv,noheader")),
        driver=next(iter(_run(smi, "--query-gpu=driver_version", "--format=csv,noheader")), None),
        links=links_of(_run(smi, "topo", "-m")),
        torch=str(torch.__version__),
        float32_products="oneDNN" if is_faster() else "MKL" if torch.backends.mkl.is_available() else "PyTorch",
        cuda=cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        flash_attn_2=version_of("flash-attn") if installed else None,
        flash_attn_4=version_of("flash-attn-4"),
        transformer_engine=te,
        te_missing=tuple(part for part in _te_parts() if te and not version_of(part)),
        triton=version_of("triton"),
    )


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed.  Imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _te_parts() -> list[str]:
    """Return the packages of a complete Transformer Engine; its core's name depends on the version of CUDA."""
    libraries = [f"transformer-engine-cu{major}" for major in (13, 12)]
    return [*_TE_PARTS, next((name for name in libraries if version_of(name)), libraries[0])]


def _run(*words: str) -> list[str]:
    """Return the lines that the command ``words`` prints; none if it is not installed or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.rstrip().splitlines() if done.returncode == 0 else []


def links_of(topology: list[str]) -> str | None:
    """Return how many links of each kind the first GPU has, from ``nvidia-smi topo -m``; None without any.

    Example: the row "GPU0  X  NV18  NV18  SYS" gives "2 x NV18, 1 x SYS".
    """
    columns = next((line.split() for line in topology if "GPU0" in line), [])
    row = next((line.split()[1:] for line in topology if line.lstrip().startswith("GPU0") and " X " in line), [])
    kinds = [kind for name, kind in zip(columns, row, strict=False) if name.startswith("GPU") and kind != "X"]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or None


def choices(machine: LocalMachine) -> list[AcceptedSettings]:
    """Return one item per group of recipes: the kernel, layers and dtype for ``machine``, as text to print."""
    if not machine.gpus:
        return [AcceptedSettings("every recipe", "run=local, the default", "cpu", "flash_cpu", "local", "float32")]
    whole = machine.transformer_engine is not None and not machine.te_missing
    words = "run=gpu model.dtype=bfloat16"
    packages = {"flash_attn": machine.flash_attn_2, "triton": machine.triton}
    kernel = " or ".join([_GPU_KERNELS, *(name for name, package in packages.items() if package)])
    return [
        AcceptedSettings("generate, chat, eval", words, "cuda", kernel, "te" if whole else "local", "bfloat16"),
        AcceptedSettings("pretrain, extend, finetune", words, "cuda", kernel, "te" if whole else "local", "bfloat16"),
        AcceptedSettings(
            "spd_sensitivity, spd_adapt", "run=local, the default", "cpu", "flash_cpu", "local", "float32"
        ),
    ]


def missing_parts(machine: LocalMachine) -> list[Missing]:
    """Return the parts that are missing on ``machine``.

    If torch can use no GPU, only a GPU is listed, since libraries for it would not be used.  If the reason is a CPU
    build of torch on a machine with GPUs, a CUDA build is listed, and the missing libraries.
    """
    parts = []
    if machine.listed_gpus and machine.cuda is None:
        parts.append(Missing("a CUDA build of torch", f"{len(machine.listed_gpus)} GPU(s) are not used", "make gpu"))
    elif machine.listed_gpus and not machine.gpus:
        cost = f"torch {machine.torch} cannot use the {len(machine.listed_gpus)} GPU(s)"
        return [Missing("a driver for this CUDA, or GPUs in CUDA_VISIBLE_DEVICES", cost, "update the driver")]
    elif not machine.gpus:
        return [Missing("a GPU", "run.device=cuda is refused", "use a machine with GPUs, and make gpu there")]
    if machine.te_missing:
        lacking = ", ".join(machine.te_missing)
        parts.append(Missing(f"part of Transformer Engine ({lacking})", "model.layers=te is refused", "make gpu"))
    elif machine.transformer_engine is None:
        parts.append(Missing("Transformer Engine", "model.layers=te is refused: layers are local", "make gpu"))
    if machine.flash_attn_2 is None:
        cost = f"context.kernel=flash_attn is refused: use {_GPU_KERNELS}"
        cost += "; no recipe uses flash-attn-4" if machine.flash_attn_4 else ""
        parts.append(Missing("flash-attn 2", cost, "make gpu"))
    return parts


def report(machine: LocalMachine) -> list[tuple[str, str]]:
    """Return the lines to print, as (name, text): what was found, settings that recipes accept, what is missing."""
    gpu = f"{machine.gpu_memory_bytes / 1e9:.0f} GB each, driver {machine.driver or 'unknown'}"
    gpus = machine.gpus or machine.listed_gpus
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    te = machine.transformer_engine and f"{machine.transformer_engine}{' (incomplete)' if machine.te_missing else ''}"
    cuda = f"CUDA {machine.cuda}, NCCL {machine.nccl}" if machine.cuda else "a CPU build, gloo only"
    flash = f"2: {machine.flash_attn_2 or 'none'}; 4: {machine.flash_attn_4 or 'none'}"
    lines = [
        ("processor", f"{machine.processor}: {machine.cores} cores, {', '.join(machine.instructions) or 'no AVX2'}"),
        ("memory", f"{machine.memory_bytes / 1e9:.1f} GB"),
        ("GPUs", f"{names}, {gpu}" if machine.gpus else (f"{names}, which torch cannot use" if names else "none")),
        ("links between GPUs", machine.links or "none"),
        ("torch", f"{machine.torch}, {cuda}; float32 products on CPU by {machine.float32_products}"),
        ("flash-attn", flash),
        ("Transformer Engine", f"{te or 'none'}; Triton: {machine.triton or 'none'}"),
    ]
    lines += [
        (choice.recipes, f"kernel {choice.kernel}, layers {choice.layers}, {choice.dtype}: {choice.words}")
        for choice in choices(machine)
    ]
    lines += [(f"missing: {each.part}", f"{each.cost}; {each.install}") for each in missing_parts(machine)]
    return lines


def task(config: DictConfig) -> None:
    """Print the report, and write it if ``out`` is given."""
    settings = top_level(config, DoctorSettings)
    refuse_unwritable(settings.out)
    refuse_other_recipe(settings.out, RECIPE)
    machine = find_machine()
    table = Table(show_header=False, box=None)
    for name, text in report(machine):
        table.add_row(name, text)
    console.print(table)
    with record(config, RECIPE):
        if settings.out:
            result = {
                "found": asdict(machine),
                "takes": [asdict(choice) for choice in choices(machine)],
                "missing": [asdict(part) for part in missing_parts(machine)],
                **provenance(),
            }
            write_result(settings.out, result)


if __name__ == "__main__":
    main("doctor", task)
