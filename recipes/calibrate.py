"""Measure this machine's attention kernel, layers and links in under a minute, and write them to a hardware file.

python -m recipes.calibrate out=laptop.yaml
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import DictConfig
from rich.table import Table

from longctx.config.run import KernelName
from longctx.cost.hardware import Hardware
from longctx.parallel.launch import Rank
from longctx.parallel.launcher import current_rank
from longctx.text_file import write_text
from recipes.common.cli import console, main, on_ranks, threads_here, warm_up_ranks
from recipes.common.manifest import record, refuse_other_recipe
from recipes.common.places import refuse_unwritable
from recipes.common.provenance import cores, provenance
from recipes.common.settings import top_level
from recipes.common.strategy_choice import kernel_on_ring, measure_ring
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime


RECIPE = "recipes.calibrate"


@dataclass(frozen=True)
class CalibrateSettings:
    """Top-level settings of configs/calibrate.yaml."""

    out: str
    kernel: KernelName = "auto"


def measure_tiles(runtime: Runtime, target: Target) -> tuple[float, float]:
    """Return `Hardware`'s ``backward`` and ``causal``; every rank must call it.

    On a CPU, all ranks measure them at once.  On a GPU, they are the ratios of FLOPs.
    """
    from longctx.parallel.measure.probe import probe_tiles

    is_cpu = runtime.device.type == "cpu"
    return probe_tiles(*kernel_on_ring(runtime, target)) if is_cpu else (Hardware.backward, Hardware.causal)


def run_rank(rank: Rank, target: Target) -> Hardware:
    """Measure links, kernel, layers and GEMMs on one rank; the caller uses the first rank's result."""
    import torch

    from longctx.parallel.measure.probe import gemm_flops
    from recipes.common.layer_rates import measure_layer

    with target.runtime(rank, training=True) as runtime:
        peak = gemm_flops(runtime.world, getattr(torch, target.model.dtype), runtime.device)
        ring, layer = measure_ring(runtime, target), measure_layer(runtime, target)
        backward, causal = measure_tiles(runtime, target)
        return replace(ring, peak_flops=peak, layer=layer, backward=backward, causal=causal)


def show(constants: Hardware) -> None:
    """Print the constants of a hardware file in common units."""
    table = Table(show_header=False, box=None)
    table.add_row("attention, wide blocks", f"{constants.flops / 1e9:,.1f} GFLOP/s a rank")
    table.add_row("keys and values, few rows", f"{constants.kv_bytes_per_s / 1e9:,.2f} GB/s a rank")
    table.add_row("backward of a block, in forwards", f"{constants.backward:.1f}")
    table.add_row("a causal tile, by its visible pairs", f"{constants.causal:.1f}")
    table.add_row("launch of one more block", f"{constants.block_s * 1e6:,.0f} us")
    if constants.peak_flops:
        table.add_row("GEMMs (peak for MFU)", f"{constants.peak_flops / 1e9:,.1f} GFLOP/s a rank")
    if layer := constants.layer:
        table.add_row("a layer's GEMMs, many rows", f"{layer.gemm_flops / 1e9:,.1f} GFLOP/s a rank")
        table.add_row("a layer's weights, one row", f"{layer.weight_bytes_per_s / 1e9:,.2f} GB/s a rank")
        table.add_row("overhead of a layer", f"{layer.layer_s * 1e6:,.0f} us")
        if training := layer.training:
            table.add_row("backward of a layer, in forwards", f"{training.backward:.1f}")
            table.add_row("a million weights in a training step", f"{training.gradient_s * 1e9:,.1f} ms")
            table.add_row("a million weights in the optimizer", f"{training.update_s * 1e9:,.1f} ms")
            table.add_row("a million logits of the loss", f"{training.loss_s * 1e9:,.1f} ms")
        if layer.reduce:
            step = f"{layer.reduce.latency_s * 1e6:,.0f} us + {layer.reduce.bytes_per_s / 1e9:,.2f} GB/s"
            table.add_row("a step of an all-reduce", step)
    for name, link in (("one hop of the ring", constants.hop), ("one all-to-all", constants.exchange)):
        table.add_row(name, f"{link.latency_s * 1e6:,.0f} us + {link.bytes_per_s / 1e9:,.2f} GB/s")
    table.add_row("overlap of compute and communication", f"{constants.overlap:.0%}")
    console.print(table)


def resolve_calibration(config: DictConfig) -> tuple[Target, CalibrateSettings]:
    """Return the target to measure and the settings.  Raises ValueError, with what to set, if it cannot be measured."""
    from longctx.attention.backends import kernel_for

    settings = top_level(config, CalibrateSettings)
    target = resolve_target(config, RECIPE, unused_axes=("dp", "pp"), needs_weights=False)
    target = replace(target, context=replace(target.context, kernel=settings.kernel))
    run, mesh = target.run, target.mesh
    if mesh.ring < 2:
        raise ValueError(f"mesh.ring={mesh.ring} has no links to measure: use mesh.ring=2 or more")
    kernel_for(settings.kernel, run.device, target.model.dtype)
    if run.device == "cpu" and (run.threads or 0) > (share := threads_here(None, mesh)):
        raise ValueError(
            f"run.threads={run.threads}: each rank has {share} of this machine's cores, and more threads would slow "
            f"the ranks down while they are measured; use run.threads={share}"
        )
    refuse_unwritable(settings.out, suffixes=(".yaml", ".yml"))
    refuse_other_recipe(settings.out, RECIPE)
    return target, settings


def task(config: DictConfig) -> None:
    """Measure on all ranks, then write and show the constants of the first rank."""
    warm_up_ranks(
        [
            "longctx.megatron.runtime",
            "longctx.parallel.measure.probe",
            "recipes.common.layer_rates",
            "longctx.megatron.training.optimizer",
        ]
    )
    target, settings = resolve_calibration(config)
    with record(config, RECIPE):
        result = on_ranks(target.mesh, run_rank, target)
        if result is None:
            return
        show(result)
        # Threads do not change a GPU's speed.
        threads = threads_here(target.run.threads, target.mesh) if target.run.device == "cpu" else None
        if threads:
            rank = current_rank()
            nodes = rank.world_size // rank.local_world_size if rank else 1
            # Ranks that are measured while they share cores are as slow as they were measured.
            at_once = max(target.mesh.ranks, nodes * (cores() // threads))
            result = replace(result, ranks_at_once=at_once)
        metadata = {
            **provenance(),
            "mesh": str(target.mesh),
            "threads": threads,
            "model": target.model.name,
            "dtype": target.model.dtype,
        }
        write_text(Path(settings.out), yaml.safe_dump({"measured": metadata, **asdict(result)}, sort_keys=False))
    console.print(f"written to {settings.out}")


if __name__ == "__main__":
    main("calibrate", task)
