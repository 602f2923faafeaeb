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
from longctx.cost.forward import layer_weights
from longctx.cost.hardware import Hardware, LayerRates, Link
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
LAYERS = 6  # layers to measure; one layer's weights may stay in the cache


@dataclass(frozen=True)
class CalibrateSettings:
    """Top-level settings of configs/calibrate.yaml."""

    out: str
    kernel: KernelName = "auto"


def measure_backward(runtime: Runtime, target: Target) -> float:
    """Return the time of an attention block's backward as a multiple of its forward's; every rank must call it.

    On a CPU, all ranks measure it at once.  On a GPU, the result is the ratio of FLOPs, 2.5.
    """
    from longctx.parallel.measure.probe import probe_backward

    is_cpu = runtime.device.type == "cpu"
    return probe_backward(*kernel_on_ring(runtime, target)) if is_cpu else Hardware.backward


def measure_layer(runtime: Runtime, target: Target) -> LayerRates | None:
    """Measure the rates of one rank's layers without their attention; every rank must call it.

    Runs the first `LAYERS` layers with random weights, which together do not fit in a CPU's cache.  Returns None for a
    mixture of experts, and with tensor parallelism, whose reductions would be timed as well.
    """
    import torch

    from longctx.megatron.attention import Pass, rotary_tables
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.model import build_model, hidden_states
    from longctx.megatron.products import linear
    from longctx.parallel.measure.probe import probe_layer

    if target.shape.mixture or target.mesh.tp > 1:
        return None
    shape, dtype = target.shape.first(min(LAYERS, target.shape.layers)), getattr(torch, target.model.dtype)
    net = build_model(shape, runtime.groups, dtype=dtype, layers="local", device=runtime.device)
    hf_load.load(net, RandomInit(shape, seed=0), shape)

    def forward(tokens: int) -> object:
        positions = torch.arange(tokens, device=runtime.device)
        one_pass = Pass(attend=lambda _layer, q, *_others: q, rotary=rotary_tables(shape, positions, dtype))
        return hidden_states(net, positions.remainder(shape.vocab_size).unsqueeze(0), one_pass)

    weights = sum(layer_weights(shape)) * shape.layers
    all_layers = probe_layer(runtime.world, forward, weights, dtype, runtime.device, linear)
    return replace(all_layers, layer_s=all_layers.layer_s / shape.layers, reduce=measure_reduce(runtime))


def measure_reduce(runtime: Runtime) -> Link | None:
    """Measure one step of an all-reduce over the ranks that share gradients; every rank must call it.

    Returns None on a GPU, where calls return early, and if these ranks are not all ranks.  A ring of n ranks takes
    2 (n - 1) steps, each of which sends 1/n of the bytes.
    """
    from longctx.parallel.measure.all_reduce import time_all_reduce

    group, ranks = runtime.groups.dp_cp, runtime.world.size
    if runtime.device.type != "cpu" or group.size() != ranks:
        return None
    sizes = (2**10, 2**24)
    small, large = (time_all_reduce(group, size, 5, runtime.device) / (2 * (ranks - 1)) for size in sizes)
    return Link(small, (sizes[1] - sizes[0]) / ranks / max(large - small, 1e-9))


def run_rank(rank: Rank, target: Target) -> Hardware:
    """Measure links, kernel, layers and GEMMs on one rank; the caller uses the first rank's result."""
    import torch

    from longctx.parallel.measure.probe import gemm_flops

    with target.runtime(rank) as runtime:
        peak = gemm_flops(runtime.world, getattr(torch, target.model.dtype), runtime.device)
        ring, layer = measure_ring(runtime, target), measure_layer(runtime, target)
        return replace(ring, peak_flops=peak, layer=layer, backward=measure_backward(runtime, target))


def show(constants: Hardware) -> None:
    """Print the constants of a hardware file in common units."""
    table = Table(show_header=False, box=None)
    table.add_row("attention, wide blocks", f"{constants.flops / 1e9:,.1f} GFLOP/s a rank")
    table.add_row("keys and values, few rows", f"{constants.kv_bytes_per_s / 1e9:,.2f} GB/s a rank")
    table.add_row("backward of a block, in forwards", f"{constants.backward:.1f}")
    table.add_row("launch of one more block", f"{constants.block_s * 1e6:,.0f} us")
    if constants.peak_flops:
        table.add_row("GEMMs (peak for MFU)", f"{constants.peak_flops / 1e9:,.1f} GFLOP/s a rank")
    if layer := constants.layer:
        table.add_row("a layer's GEMMs, many rows", f"{layer.gemm_flops / 1e9:,.1f} GFLOP/s a rank")
        table.add_row("a layer's weights, one row", f"{layer.weight_bytes_per_s / 1e9:,.2f} GB/s a rank")
        table.add_row("overhead of a layer", f"{layer.layer_s * 1e6:,.0f} us")
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
    warm_up_ranks(["longctx.megatron.runtime", "longctx.parallel.measure.probe"])
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
            result = replace(result, ranks_at_once=max(1, nodes * (cores() // threads)))
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
