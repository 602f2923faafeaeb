"""Settings of slurm.submit, and their separation from the recipe's settings on one command line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import NonNegativeInt, PositiveInt

from recipes.common.cli import compose_config, say
from recipes.common.overrides import CONFIGS, as_overrides, choices, is_quoted, quote
from recipes.common.settings import section, top_level

NOT_QUEUED = 0  # stands for the number of a pipeline's previous job before that job is queued
_FREE_TEXT = (
    *("folder", "pipeline", "name", "time"),
    *("launcher.container", "launcher.partition", "launcher.account", "launcher.qos"),
)
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Launcher:
    """Settings of configs/launcher: sbatch and srun options of one cluster.

    ``partition`` is a name, or several with commas, of which Slurm takes the first that is free.
    ``how=local`` runs the job script on this machine without Slurm.  ``memory`` is per node, in Slurm's notation.
    ``gpus_per_rank=None`` means one with ``run.device=cuda`` and none otherwise.  ``setup`` are shell lines that run
    before the ranks start; ``container`` are words in front of ``python``.
    """

    how: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: str | None = None
    cpus_per_rank: PositiveInt | None = None
    gpus_per_rank: NonNegativeInt | None = None
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None


@dataclass(frozen=True)
class SubmitSettings:
    """Settings of configs/submit.yaml outside ``launcher``; exactly one of ``recipe`` and ``pipeline`` is given.

    ``folder`` is the job's folder.  ``after`` are ids of jobs that must succeed first.  At most ``parallel`` runs of a
    sweep run at a time (None: all).  A failed job restarts at most ``restarts`` times; requested stops do not count.
    ``warning`` is in seconds before the time limit (None: see ``warning_s``).
    """

    recipe: str | None = None
    pipeline: str | None = None
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None
    time: str | PositiveInt = "01:00:00"
    name: str | None = None
    folder: str | None = None
    after: PositiveInt | tuple[PositiveInt, ...] | None = None
    parallel: PositiveInt | None = None
    restarts: NonNegativeInt = 2
    warning: PositiveInt | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.pipeline):
            raise ValueError(
                "exactly one of recipe and pipeline must be set: use recipe=NAME (generate, ...) or pipeline=FILE.yaml"
            )
        if not seconds_of(str(self.time)):
            raise ValueError(
                f"time={self.time} is not a time: use minutes, hours:minutes:seconds or days-hours:minutes:seconds"
            )
        if self.warning and self.warning >= seconds_of(str(self.time)):
            raise ValueError(
                f"warning={self.warning} is not before the end of time={self.time}: use less than "
                f"{seconds_of(str(self.time))} seconds"
            )

    @property
    def jobs_before(self) -> tuple[int, ...]:
        """Slurm ids of the jobs that must succeed before this one starts; `NOT_QUEUED` is a pipeline's previous job."""
        return self.after if isinstance(self.after, tuple) else (self.after,) if self.after else ()

    @property
    def warning_s(self) -> int:
        """Seconds before the time limit at which the ranks get SIGUSR1."""
        return self.warning or min(120, seconds_of(str(self.time)) // 4)


def seconds_of(time: str) -> int:
    """Return the seconds of ``time`` in Slurm's notation ("1-02:00:00", "30"), 0 if it cannot be read.

    After ``days-`` the fields are hours, minutes and seconds, and missing ones are at the end.  Without days one field
    is minutes, two are minutes and seconds, three are hours, minutes and seconds (sbatch(1), ``--time``).
    """
    match = _TIME.fullmatch(time)
    if not match:
        return 0
    values = [int(value) for value in match["fields"].split(":")]
    if match["days"]:
        hours, minutes, seconds = (*values, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: [0, *values, 0], 2: [0, *values], 3: values}[len(values)]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the words of slurm.submit and those of the recipe.

    ``nodes=2`` and ``launcher.qos=low`` are slurm.submit's; ``run.threads=2`` and ``run=gpu`` are the recipe's.
    ``run=DIR`` becomes ``folder=DIR``.  Raises ValueError for a word that begins with a dash.
    """
    if options := [word for word in words if word.startswith("-")]:
        raise ValueError(
            f"{options[0]} is not a setting: write KEY=VALUE; a sweep needs only a list, such as optim.lr=1e-3,3e-4"
        )
    own = set(yaml.safe_load((CONFIGS / "submit.yaml").read_text())) - {"defaults", "hydra"} | {"launcher"}
    words = [_rename_folder(word) for word in words]
    is_own = [word.lstrip("+~").partition("=")[0].partition(".")[0] in own for word in words]
    return (
        [word for word, mine in zip(words, is_own, strict=True) if mine],
        [word for word, mine in zip(words, is_own, strict=True) if not mine],
    )


def _rename_folder(word: str) -> str:
    """Rename ``run=DIR``, the old name of ``folder=DIR``; ``run=gpu`` is a choice of the recipe's group `run`."""
    key, equals, value = word.partition("=")
    if key != "run" or not equals or set(value.split(",")) <= set(choices("run")):
        return word
    say(f"run={value} is an old name: use folder={value}")
    return f"folder={value}"


def read_settings(words: Sequence[str]) -> tuple[SubmitSettings, Launcher]:
    """Return the settings that ``words``, those of slurm.submit, ask for.

    Raises ValueError, in one line, for an unknown setting and a value that is not allowed.
    """
    config = compose_config("submit", as_overrides("submit", [_quote_free_text(word) for word in words], say))
    settings, launcher = top_level(config, SubmitSettings), section(config, "launcher", Launcher)
    # Each entry of ``setup`` is shell code, which may have line breaks.
    own = {f"launcher.{name}": value for name, value in vars(launcher).items() if name != "setup"}
    for name, value in {**vars(settings), **own}.items():
        for text in value if isinstance(value, tuple) else (value,):
            refuse_line_breaks(name, str(text))
    return settings, launcher


def refuse_line_breaks(name: str, text: str) -> None:
    """Raise ValueError if ``text``, the setting ``name``, has a control character: sbatch reads an option per line."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"{name}={text!r} has a line break or another control character: leave it out")


def _quote_free_text(word: str) -> str:
    """Return ``word``, with its value in quotes if it may hold commas or parentheses, which Hydra would interpret."""
    key, _, value = word.partition("=")
    is_read_by_hydra = value in ("", "null") or (key.startswith("launcher.") and is_quoted(value))
    return f"{key}={quote(value)}" if key in _FREE_TEXT and not is_read_by_hydra else word


def absolute(path: str) -> Path:
    """Return ``path`` as an absolute path, which does not depend on the working directory of a node."""
    return Path(path).expanduser().resolve()
