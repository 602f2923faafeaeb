"""The order of blocks for variants that drop a share of them, measured first where nobody has given one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.variants import Variant
from longctx.parallel.launch import rank_from_environment
from longctx.spd.plan import order_from, saved_plan, within
from recipes import spd_sensitivity
from recipes.common.cli import composed, is_first, leave_stopped, on_every_rank, say

Named = tuple[str, DictConfig]
_LENGTH = 512  # tokens of a sequence of text


def with_order(configs: Sequence[Named], base: Variant, sequences: int, out: Path) -> list[Named]:
    """``configs``, where a share of ranked blocks drops and no order of them is given, with the blocks that drop.

    The order is measured at their degree of tensor parallelism, on ``sequences`` of text, and kept in
    ``out``/sensitivity-tpN/sensitivity.json; it is taken from there if it is there already.  Every rank that a
    launcher started calls this.
    """
    orders = {tp: _measured(job) for tp, job in order_jobs(configs, base, sequences, out).items()}

    def complete(config: DictConfig) -> DictConfig:
        return _dropping(config, within(orders[config.mesh.tp], config.spd.budget)) if lacks_order(config) else config

    return [(name, complete(config)) for name, config in configs]


def order_jobs(
    configs: Sequence[Named], base: Variant, sequences: int, out: Path
) -> dict[int, spd_sensitivity.SensitivityJob]:
    """By degree of tensor parallelism, the job that measures an order that ``configs`` lack.

    Raises ValueError, with what to do instead, if it cannot be measured.
    """
    degrees = dict.fromkeys(config.mesh.tp for _, config in configs if lacks_order(config))
    return {tp: _order_job(base, tp, sequences, out / f"sensitivity-tp{tp}") for tp in degrees}


def without_order(config: DictConfig) -> DictConfig:
    """``config`` with nothing dropped, if the order to drop it in is not known yet."""
    return _dropping(config, ()) if lacks_order(config) else config


def _dropping(config: DictConfig, blocks: Sequence[int]) -> DictConfig:
    return _merged(config, {"spd": {"drop": "saved", "budget": None, "blocks": list(blocks)}})


def _merged(config: DictConfig, values: Any) -> DictConfig:
    merged = OmegaConf.merge(config, values)
    assert isinstance(merged, DictConfig)
    return merged


def lacks_order(config: DictConfig) -> bool:
    """Whether a share of ranked blocks drops, and nobody has said in which order."""
    if config.spd.drop not in ("saved", "ranked") or config.spd.budget is None or config.spd.sensitivity:
        return False
    source = config.model.get("source")
    return not (source and saved_plan(Path(source).expanduser()))


def _order_job(base: Variant, tp: int, sequences: int, out: Path) -> spd_sensitivity.SensitivityJob:
    here = rank_from_environment(os.environ)
    parts = here.world_size // tp if here else 1  # all ranks that a launcher has started take part
    words = [f"mesh.tp={tp}", f"mesh.dp={parts}", f"sequences={sequences}", "model=folder"]
    words += [f"model.dtype={base.target.model.dtype}", f"data.length={min(_LENGTH, base.target.shape.max_positions)}"]
    config = composed("spd_sensitivity", [*words, "model.name=x", "model.source=x", "out=x"])
    values: Any = {"model": {"name": base.target.model.name, "source": str(base.target.folder)}, "out": str(out)}
    return spd_sensitivity.prepare(_merged(config, values), "eval.run")


def _measured(job: spd_sensitivity.SensitivityJob) -> tuple[int, ...]:
    """The order, by `recipes.spd_sensitivity`."""
    target = job.target
    if job.file.is_file():
        return order_from(job.file, target.shape.layers, target.mesh.tp, target.fingerprint)
    say(f"the order in which blocks are dropped is measured first, at mesh.tp={target.mesh.tp}")
    found = on_every_rank(target.mesh, spd_sensitivity.run_rank, job)
    if found is None:
        leave_stopped()
    if is_first():
        spd_sensitivity.write_sensitivity(job, found)
    return found.order
