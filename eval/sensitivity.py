"""The order of blocks for variants that drop a share of them, measured first where nobody has given one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from eval.variants import Variant
from longctx.spd.plan import saved_plan
from recipes import spd_sensitivity
from recipes.start import on_ranks, say

Named = tuple[str, DictConfig]
_LENGTH = 512  # tokens of a sequence of text


def with_order(configs: Sequence[Named], base: Variant, sequences: int, out: Path) -> list[Named]:
    """``configs``, those of ranked blocks without an order having that of ``out``/sensitivity/sensitivity.json.

    It is measured at their degree of tensor parallelism, on ``sequences`` of text, unless it is there already.
    """
    orders: dict[int, Path] = {}
    changed = []
    for name, config in configs:
        if not _lacks_order(config):
            changed.append((name, config))
            continue
        tp = config.mesh.tp
        orders[tp] = orders.get(tp) or _measured(base, tp, sequences, out / f"sensitivity-tp{tp}")
        changed.append((name, _merged(config, {"spd": {"sensitivity": str(orders[tp])}})))
    return changed


def without_order(config: DictConfig) -> DictConfig:
    """``config`` with nothing dropped, if the order to drop it in is not known yet."""
    return _merged(config, {"spd": {"drop": "none", "budget": None}}) if _lacks_order(config) else config


def _merged(config: DictConfig, values: Any) -> DictConfig:
    merged = OmegaConf.merge(config, values)
    assert isinstance(merged, DictConfig)
    return merged


def _lacks_order(config: DictConfig) -> bool:
    if config.spd.drop not in ("saved", "ranked") or config.spd.budget is None or config.spd.sensitivity:
        return False
    source = config.model.get("source")
    return not (source and saved_plan(Path(source).expanduser()))


def _measured(base: Variant, tp: int, sequences: int, out: Path) -> Path:
    """The file of the order, which `recipes.spd_sensitivity` writes."""
    words = [f"mesh.tp={tp}", f"sequences={sequences}", "model=folder", f"model.dtype={base.model.dtype}"]
    words.append(f"data.length={min(_LENGTH, base.shape.positions)}")
    config = hydra.compose("spd_sensitivity", [*words, "model.name=x", "model.source=x", "out=x"])
    values: Any = {"model": {"name": base.model.name, "source": str(base.folder)}, "out": str(out)}
    job = spd_sensitivity.prepare(_merged(config, values), "eval.run")
    if not job.file.is_file():
        say(f"the order in which blocks are dropped is measured first, at mesh.tp={tp}")
        result = on_ranks(job.subject.mesh, spd_sensitivity.run_rank, job)
        if result is not None:
            spd_sensitivity.keep(job, result)
    return job.file
