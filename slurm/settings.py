"""What slurm.submit is asked: its own settings, and those of the recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import NonNegativeInt, PositiveInt

from recipes.common.cli import composed, say
from recipes.common.overrides import CONFIGS, as_overrides
from recipes.common.settings import section, top_level

NOT_YET = 0  # the number of a pipeline's job that is not queued
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Launcher:
    """How a cluster wants to be asked: configs/launcher."""

    how: Literal["slurm", "local"]
    partition: str | None
    account: str | None
    qos: str | None
    memory: str | None
    cpus_per_rank: PositiveInt | None
    gpus_per_rank: NonNegativeInt | None
    sbatch: tuple[str, ...]
    srun: tuple[str, ...]
    setup: tuple[str, ...]
    container: str | None


@dataclass(frozen=True)
class SubmitSettings:
    """The settings of configs/submit.yaml."""

    recipe: str | None
    pipeline: str | None
    nodes: PositiveInt
    ranks_per_node: PositiveInt | None
    time: str | PositiveInt
    name: str | None
    run: str | None
    after: PositiveInt | tuple[PositiveInt, ...] | None
    parallel: PositiveInt | None
    restarts: NonNegativeInt
    warning: PositiveInt | None
    dry_run: bool

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.pipeline):
            raise ValueError("say what to run: recipe=generate, recipe=pretrain, ..., or pipeline=FILE.yaml")
        if not seconds_of(str(self.time)):
            raise ValueError(f"time={self.time}: use minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        if self.warning and self.warning >= seconds_of(str(self.time)):
            raise ValueError(f"warning={self.warning} is not before the end of time={self.time}: use fewer seconds")

    @property
    def jobs_before(self) -> tuple[int, ...]:
        """The jobs that must have ended well."""
        return self.after if isinstance(self.after, tuple) else (self.after,) if self.after else ()

    @property
    def warning_s(self) -> int:
        """Seconds before the time limit at which a run is asked to stop."""
        return self.warning or min(120, seconds_of(str(self.time)) // 4)


def seconds_of(time: str) -> int:
    """Slurm's way to write a time, in seconds; 0 if it is none."""
    found = _TIME.fullmatch(time)
    if not found:
        return 0
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"]:  # days-hours:minutes:seconds, what is missing is at the end
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:  # minutes, minutes:seconds, hours:minutes:seconds
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of slurm.submit itself, and the recipe's."""
    own = set(yaml.safe_load((CONFIGS / "submit.yaml").read_text())) - {"defaults"} | {"launcher"}
    mine = [word for word in words if word.lstrip("+~").partition("=")[0].partition(".")[0] in own]
    return mine, [word for word in words if word not in mine]


def settings_of(words: Sequence[str]) -> tuple[SubmitSettings, Launcher]:
    """slurm.submit's own ``words`` as settings.  Raises ValueError, in a line, for what cannot be."""
    quoted = [_quoted(word) for word in words]
    config = composed("submit", as_overrides("submit", quoted, say))
    return top_level(config, SubmitSettings), section(config, "launcher", Launcher)


def _quoted(word: str) -> str:
    """Free text, in quotes: paths and names may have commas and spaces."""
    key, _, value = word.partition("=")
    free = key in ("run", "pipeline", "name", "time", "launcher.container") and value not in ("", "null")
    return f"{key}={_in_quotes(value)}" if free else word


def _in_quotes(value: str) -> str:
    return value if value[:1] in ("'", '"') else "'" + value.replace("'", "\\'") + "'"


def absolute(path: str) -> Path:
    """``path`` as every node finds it."""
    return Path(path).expanduser().resolve()
