"""The order of blocks for variants that drop a share of them, measured before the evaluation if none is given."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from eval.variants import Variant
from longctx.config.spd import SPD
from longctx.parallel.launcher import current_rank
from longctx.spd.plan import order_from, saved_plan, within
from recipes import spd_sensitivity
from recipes.common.cli import compose_config, is_first, leave_stopped, on_every_rank, say
from recipes.common.settings import section

Named = tuple[str, DictConfig]
_LENGTH = 512  # tokens of a sequence of text


def lacks_order(config: DictConfig) -> bool:
    """Return True if ``config`` drops a share of ranked blocks whose order is not known yet.

    The order is known from the file spd.sensitivity, or from the plan in the model's folder.  No order is needed for a
    share of 0, or if one rank has all shares of a block.
    """
    if config.spd.drop not in ("saved", "ranked") or not config.spd.budget or config.spd.sensitivity:
        return False
    if _degree(config) == 1:
        return False
    source = config.model.get("source")
    return not (source and saved_plan(Path(source).expanduser()))


def drop_none_yet(config: DictConfig) -> DictConfig:
    """Return ``config`` with no block dropped if the order of its ranked blocks is not known yet, else unchanged.

    Raises ValueError for a section ``spd`` that contradicts itself.
    """
    if not lacks_order(config):
        return config
    section(config, "spd", SPD)
    return _with_blocks(config, ())


def make_order_jobs(
    configs: Sequence[Named], base: Variant, sequences: int, out: Path
) -> dict[int, spd_sensitivity.SensitivityJob]:
    """Return the jobs that measure the orders of blocks that ``configs`` lack, by number of ranks that share a block.

    The order is of the baseline's blocks, on ``sequences`` sequences of text; a job's folder is
    ``out``/sensitivity-tpN.
    Raises ValueError, with what to set instead, if an order cannot be measured.
    """
    degrees = dict.fromkeys(_degree(config) for _, config in configs if lacks_order(config))
    return {tp: _make_order_job(base, tp, sequences, out / f"sensitivity-tp{tp}") for tp in degrees}


def fill_in_orders(configs: Sequence[Named], base: Variant, sequences: int, out: Path) -> list[Named]:
    """Return ``configs``; those that lacked an order of blocks now list the blocks to drop.

    An order is measured, or read if an earlier run of the same ``out`` measured it.
    Starts ranks; every rank that a launcher started must call this.
    """
    orders = {tp: _read_or_measure(job) for tp, job in make_order_jobs(configs, base, sequences, out).items()}

    def complete(config: DictConfig) -> DictConfig:
        if not lacks_order(config):
            return config
        return _with_blocks(config, within(orders[_degree(config)], config.spd.budget))

    return [(name, complete(config)) for name, config in configs]


def _degree(config: DictConfig) -> int:
    """Return the number of ranks among which a dropped reduction would sum: tensor-parallel ones, or context ranks.

    Context ranks take their place in sharded decoding (see `recipes.common.spd_plan.plan_of`).
    """
    mesh = config.mesh
    shares = config.context.decode == "sharded" and mesh.tp == 1
    return int(mesh.ulysses * mesh.ring if shares else mesh.tp)


def _with_blocks(config: DictConfig, blocks: Sequence[int]) -> DictConfig:
    return _merge(config, {"spd": {"drop": "saved", "budget": None, "blocks": list(blocks)}})


def _merge(config: DictConfig, values: dict[str, object]) -> DictConfig:
    merged = OmegaConf.merge(config, values)
    assert isinstance(merged, DictConfig)
    return merged


def _make_order_job(base: Variant, tp: int, sequences: int, out: Path) -> spd_sensitivity.SensitivityJob:
    model, folder, shape = base.target.model, base.target.folder, base.target.shape
    rank = current_rank()
    dp = rank.world_size // tp if rank else 1  # all ranks that a launcher started take part
    words = [f"mesh.tp={tp}", f"mesh.dp={dp}", f"sequences={sequences}", "model=folder"]
    words += [f"model.dtype={model.dtype}", f"data.length={min(_LENGTH, shape.max_positions)}"]
    # Paths are merged in: Hydra would read commas and brackets in them as its syntax.
    config = compose_config("spd_sensitivity", [*words, "model.name=x", "model.source=x", "out=x"])
    paths: dict[str, object] = {
        "model": {"name": model.name, "source": str(folder), "cache": model.cache},
        "run": {"threads": base.target.run.threads, "timeout_minutes": base.target.run.timeout_minutes},
        "out": str(out),
    }
    return spd_sensitivity.prepare(_merge(config, paths), "eval.run")


def _read_or_measure(job: spd_sensitivity.SensitivityJob) -> tuple[int, ...]:
    """Return the order of blocks, the least sensitive first, from the job's file; without it, measure and write it.

    Every rank that a launcher started must call this.
    """
    target = job.target
    if job.file.is_file():
        return order_from(job.file, target.shape.layers, target.mesh.tp, target.fingerprint)
    say(f"measuring the order in which blocks are dropped, at mesh.tp={target.mesh.tp}, on CPUs")
    job.out.mkdir(parents=True, exist_ok=True)
    sensitivity = on_every_rank(target.mesh, spd_sensitivity.run_rank, job)
    if sensitivity is None:
        leave_stopped()
    if is_first():
        spd_sensitivity.write_sensitivity(job, sensitivity)
    return sensitivity.order
