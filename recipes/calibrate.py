"""What this machine's kernel and links do, in under a minute: the hardware file of ``context.strategy=auto``.

python -m recipes.calibrate out=laptop.yaml
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.attention.backends import checked_kernel, kernel_for
from longctx.cost.hardware import Hardware, hardware_of
from longctx.parallel.launch import Rank
from longctx.parallel.mesh import refuse_unfit, refuse_unused
from longctx.pretrained import locate, shape_of
from longctx.schema import Mesh, ModelShape, ModelSource
from recipes.machine import provenance
from recipes.start import console, main, on_ranks, refuse_unwritable, say, section, top_level, warm_up_ranks


@dataclass(frozen=True)
class Settings:
    """The settings of configs/calibrate.yaml that are not a section of their own."""

    threads: PositiveInt
    device: Literal["cpu", "cuda"]
    kernel: Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn"]
    out: str


def hardware_from(name: str) -> Hardware:
    """The hardware of a file that this recipe wrote.  Raises ValueError if it is none."""
    try:
        values = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"hardware={name} cannot be read ({error}): write it with python -m recipes.calibrate out=FILE.yaml"
        ) from error
    return hardware_of(values, f"hardware={name}")


def measured(here: Any, shape: ModelShape, kernel: str, dtype: str) -> Hardware:
    """The constants of this ring for the heads of the model that one rank has; every rank must call it."""
    from longctx.parallel.probe import probe

    share = here.mesh.tp * here.mesh.ulysses
    heads = (shape.heads // share, max(1, shape.kv_heads // share))
    block = checked_kernel(kernel, here.device, dtype, shape.head_width)
    return probe(here.ring, block, heads, shape.head_width, getattr(torch, dtype), here.device)


def run_rank(rank: Rank, mesh: Mesh, shape: ModelShape, dtype: str, settings: Settings) -> Hardware:
    """One rank's part of the measurement."""
    from longctx.megatron.runtime import runtime
    from longctx.parallel.probe import gemm_flops

    with runtime(rank, mesh, threads=settings.threads, device=settings.device) as here:
        found = measured(here, shape, settings.kernel, dtype)
        return replace(found, peak_flops=gemm_flops(here.world, getattr(torch, dtype), here.device))


def show(on: Hardware) -> None:
    """The constants, in the units that people think in."""
    table = Table(show_header=False, box=None)
    table.add_row("attention, wide blocks", f"{on.flops / 1e9:,.1f} GFLOP/s a rank")
    table.add_row("keys and values, few rows", f"{on.kv_bytes_per_s / 1e9:,.2f} GB/s a rank")
    table.add_row("one more block", f"{on.block_s * 1e6:,.0f} us")
    if on.peak_flops:
        table.add_row("products of matrices (MFU's peak)", f"{on.peak_flops / 1e9:,.1f} GFLOP/s a rank")
    for name, link in (("a hop of the ring", on.hop), ("an all-to-all", on.exchange)):
        table.add_row(name, f"{link.latency_s * 1e6:,.0f} us + {link.bytes_per_s / 1e9:,.2f} GB/s")
    table.add_row("hidden of the shorter", f"{on.overlap:.0%}")
    console.print(table)


def task(config: DictConfig) -> None:
    """Measure; write and show what the first rank gives."""
    warm_up_ranks(["longctx.megatron.runtime", "longctx.parallel.probe"])
    settings, mesh = top_level(config, Settings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.calibrate", ("dp", "pp"))
    if mesh.ring < 2:
        raise ValueError(f"mesh.ring={mesh.ring} has no links to measure: use mesh.ring=2 or more")
    kernel_for(settings.kernel, settings.device, model.dtype)
    refuse_unwritable(settings.out)
    shape = shape_of(locate(model, say))
    refuse_unfit(mesh, shape)
    found = on_ranks(mesh, run_rank, mesh, shape, model.dtype, settings)
    if found is None:
        return
    show(found)
    about = {**provenance(), "mesh": str(mesh), "model": model.name, "dtype": model.dtype}
    Path(settings.out).write_text(yaml.safe_dump({"measured": about, **asdict(found)}, sort_keys=False))
    console.print(f"written to {settings.out}")


if __name__ == "__main__":
    main("calibrate", task)
