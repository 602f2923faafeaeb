"""The order of blocks for variants that drop a share of them, measured first where nobody has given one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from eval.variants import Variant
from longctx.pretrained import fingerprint
from longctx.spd.plan import order_from, saved_plan, within
from recipes import spd_sensitivity
from recipes.start import is_first, on_every_rank, say

Named = tuple[str, DictConfig]
_LENGTH = 512  # tokens of a sequence of text


def with_order(configs: Sequence[Named], base: Variant, sequences: int, out: Path) -> list[Named]:
    """``configs``, where a share of ranked blocks drops and no order of them is given, with the blocks that drop.

    The order is measured at their degree of tensor parallelism, on ``sequences`` of text, and kept in
    ``out``/sensitivity-tpN/sensitivity.json; it is taken from there if it is there already.  Every rank that a
    launcher started calls this.
    """
    orders: dict[int, tuple[int, ...]] = {}
    changed = []
    for name, config in configs:
        if not lacks_order(config):
            changed.append((name, config))
            continue
        tp = config.mesh.tp
        orders[tp] = orders.get(tp) or _measured(base, tp, sequences, out / f"sensitivity-tp{tp}")
        changed.append((name, _dropping(config, within(orders[tp], config.spd.budget))))
    return changed


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


def _measured(base: Variant, tp: int, sequences: int, out: Path) -> tuple[int, ...]:
    """The order, by `recipes.spd_sensitivity`."""
    words = [f"mesh.tp={tp}", f"sequences={sequences}", "model=folder", f"model.dtype={base.model.dtype}"]
    words.append(f"data.length={min(_LENGTH, base.shape.positions)}")
    config = hydra.compose("spd_sensitivity", [*words, "model.name=x", "model.source=x", "out=x"])
    values: Any = {"model": {"name": base.model.name, "source": str(base.folder)}, "out": str(out)}
    job = spd_sensitivity.prepare(_merged(config, values), "eval.run")
    if job.file.is_file():
        return order_from(job.file, base.shape.layers, tp, fingerprint(base.folder))
    say(f"the order in which blocks are dropped is measured first, at mesh.tp={tp}")
    found = on_every_rank(job.subject.mesh, spd_sensitivity.run_rank, job)
    if is_first():
        spd_sensitivity.keep(job, found)
    return tuple(found["order"])
