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
from longctx.config import Mesh, ModelSource
from longctx.cost.hardware import Hardware, hardware_of
from longctx.hf.config import shape_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from recipes.common.cli import (
    console,
    main,
    on_ranks,
    refuse_unwritable,
    say,
    section,
    threads_for,
    threads_here,
    top_level,
    warm_up_ranks,
)
from recipes.common.provenance import provenance


@dataclass(frozen=True)
class CalibrateSettings:
    """The settings of configs/calibrate.yaml that are not a section of their own."""

    threads: PositiveInt | None
    device: Literal["cpu", "cuda"]
    kernel: Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn"]
    out: str


def hardware_from(name: str) -> Hardware:
    """The hardware of a file that this recipe wrote.  Raises ValueError if it is none."""
    return hardware_of(_values(name), f"hardware={name}")


def refuse_other_threads(hardware: str | None, asked: int | None, mesh: Mesh) -> None:
    """ValueError if the file ``hardware`` was measured with other threads per rank than ``mesh`` has on this machine.

    For where the run is: a login node has other cores.  A file that does not say is taken as it is.
    """
    about = _values(hardware).get("measured") if hardware else None
    measured, threads = about.get("threads") if isinstance(about, dict) else None, threads_here(asked, mesh)
    if measured not in (None, threads):
        raise ValueError(
            f"hardware={hardware} was measured with threads={measured} per rank, this run has threads={threads}: use "
            f"threads={measured}, or measure it anew with python -m recipes.calibrate threads={threads} out=FILE.yaml"
        )


def _values(name: str) -> Any:
    try:
        return yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"hardware={name} cannot be read ({error}): write it with python -m recipes.calibrate out=FILE.yaml"
        ) from error


def measured(here: Any, shape: ModelShape, kernel: str, dtype: str) -> Hardware:
    """The constants of this ring for the heads of the model that one rank has; every rank must call it."""
    from longctx.parallel.measure.probe import probe

    share = here.mesh.tp * here.mesh.ulysses
    heads = (shape.heads // share, max(1, shape.kv_heads // share))
    block = checked_kernel(kernel, here.device, dtype, shape.head_dim)
    return probe(here.ring, block, heads, shape.head_dim, getattr(torch, dtype), here.device)


def run_rank(rank: Rank, mesh: Mesh, shape: ModelShape, dtype: str, settings: CalibrateSettings) -> Hardware:
    """One rank's part of the measurement."""
    from longctx.megatron.runtime import runtime
    from longctx.parallel.measure.probe import gemm_flops

    with runtime(rank, mesh, threads=threads_for(settings.threads, rank), device=settings.device) as here:
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
    warm_up_ranks(["longctx.megatron.runtime", "longctx.parallel.measure.probe"])
    settings, mesh = top_level(config, CalibrateSettings), section(config, "mesh", Mesh)
    model = section(config, "model", ModelSource)
    refuse_unused(mesh, "recipes.calibrate", ("dp", "pp"))
    if mesh.ring < 2:
        raise ValueError(f"mesh.ring={mesh.ring} has no links to measure: use mesh.ring=2 or more")
    kernel_for(settings.kernel, settings.device, model.dtype)
    if settings.device == "cpu" and (settings.threads or 0) > (own := threads_here(None, mesh)):
        raise ValueError(
            f"threads={settings.threads}: each rank has {own} of this machine's cores, and with more they would slow "
            f"each other down while they are measured; use threads={own}"
        )
    refuse_unwritable(settings.out)
    shape = shape_of(locate(model, say))
    refuse_unfit(mesh, shape)
    found = on_ranks(mesh, run_rank, mesh, shape, model.dtype, settings)
    if found is None:
        return
    show(found)
    # A GPU is as fast whatever the threads beside it.
    threads = threads_here(settings.threads, mesh) if settings.device == "cpu" else None
    about = {**provenance(), "mesh": str(mesh), "threads": threads, "model": model.name, "dtype": model.dtype}
    Path(settings.out).write_text(yaml.safe_dump({"measured": about, **asdict(found)}, sort_keys=False))
    console.print(f"written to {settings.out}")


if __name__ == "__main__":
    main("calibrate", task)
