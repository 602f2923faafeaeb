"""Sweeps (Hydra's --multirun): the folder of Hydra's records, and a separate path to write for each run."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.common.overrides import CONFIGS, lists_values, literal
from recipes.common.places import WRITTEN, numbered_out, refuse_unwritable_folder


def is_multirun(words: Sequence[str]) -> bool:
    """Return True if the command line asks for Hydra's multirun."""
    return bool({"-m", "--multirun"} & set(words))


def refuse_unwritable_sweep(config_name: str, overrides: Sequence[str]) -> None:
    """Raise ValueError unless Hydra can write its records of a sweep with ``overrides``; creates nothing."""
    words = [word for word in overrides if word.lstrip("+").startswith("hydra.")]
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            folder = hydra.compose(config_name, words, return_hydra_config=True).hydra.sweep.dir
    except (HydraException, OmegaConfBaseException):
        return  # Hydra will report this mistake
    refuse_unwritable_folder(folder, "hydra.sweep.dir")


def remove_empty_sweep() -> None:
    """Remove the folder that Hydra has made for its records of a sweep whose first run is refused.

    Also removes parents that are then empty.  Does nothing for a single run, or if the folder has anything else.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.sweep.dir)
    if hydra_config.mode != RunMode.MULTIRUN or {path.name for path in folder.rglob("*")} != {"multirun.yaml", "0"}:
        return
    (folder / "multirun.yaml").unlink()
    with suppress(OSError):  # up to a folder that has something else
        for made in (folder / "0", folder, *folder.parents):
            made.rmdir()


def with_numbered_places(config: DictConfig, words: Sequence[str]) -> DictConfig:
    """Return ``config``; in a sweep, add the run's number to each path that a run writes.

    Unchanged are paths of which the sweep lists several.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return config
    listed = {name for name, _, value in (word.partition("=") for word in words) if lists_values(value)}
    for name in WRITTEN:
        place = OmegaConf.select(config, name)
        if place and name not in listed:
            OmegaConf.update(config, name, literal(numbered_out(place, hydra_config.job.num)))
    return config
