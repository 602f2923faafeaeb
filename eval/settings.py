"""Settings of an evaluation: those of configs/evaluate.yaml, and its section ``eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from eval.harness.local import LOCAL

ROLLING = "loglikelihood_rolling"  # lm-eval's name for tasks that score whole texts, without a template
_DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # next to the checkout


@dataclass(frozen=True)
class EvalSettings:
    """Top-level settings of configs/evaluate.yaml."""

    out: str
    adapted: str | None = None
    variants: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """Section ``eval``: tasks, examples, and the rules of the verdicts; configs/evaluate.yaml explains each field."""

    tasks: tuple[str, ...] = ("arc_easy",)
    data: str = "auto"
    include: str | None = None
    limit: PositiveInt | None = None
    limits: Mapping[str, PositiveInt] | None = None
    num_fewshot: NonNegativeInt | None = None
    chat: bool = False
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1024,)
    text: str = "pydoc"
    seed: NonNegativeInt = 0
    max_length: PositiveInt | None = None
    prefix_token: NonNegativeInt | None = None
    max_batch_tokens: PositiveInt = 2048
    allowed_drop: NonNegativeFloat = 0.01
    resamples: PositiveInt = 10_000
    gate: tuple[str, ...] = ()
    strict: bool = True
    until: Literal["decided"] | None = None
    sensitivity: PositiveInt = 4

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("eval.tasks is empty: name at least one, such as eval.tasks=[arc_easy]")
        if self.allowed_drop >= 1:
            raise ValueError(
                f"eval.allowed_drop={self.allowed_drop:g} allows every loss: use a share of all answers, such as 0.01 "
                "for one percentage point"
            )

    @property
    def folder(self) -> Path | None:
        """Folder of the tasks' files, or None for the hub.

        ``data=auto`` is the folder shared/data next to the checkout, if it exists, else the hub.
        Raises ValueError for another folder that does not exist.
        """
        if self.data == "hub" or (self.data == "auto" and not _DEFAULT_DATA.is_dir()):
            return None
        folder = _DEFAULT_DATA if self.data == "auto" else Path(self.data).expanduser()
        if not folder.is_dir():
            raise ValueError(f"eval.data={self.data} is not a folder: give one as eval/README.md describes it, or hub")
        return folder

    def limit_of(self, task: str) -> int | None:
        """Return how many examples of ``task`` to ask at most (None: all): the smaller of ``limit`` and ``limits``."""
        return min(filter(None, (self.limit, (self.limits or {}).get(task))), default=None)

    def refuse_unknown_limits(self, tasks: Sequence[str]) -> None:
        """Raise ValueError if ``limits`` names a group of tasks, or an unknown task.

        ``tasks`` are the loaded tasks, which have other names than their group.  Their names, those of tasks from files
        (`LOCAL`) and of generated tasks are known.
        """
        from eval.harness.generated import GENERATED

        names = set(self.limits or {})
        if groups := names.intersection(self.tasks) - {*tasks, *GENERATED}:
            raise ValueError(f"eval.limits.{min(groups)} is a group of tasks: use eval.limit, or limit the tasks in it")
        if unknown := names - {*tasks, *LOCAL, *GENERATED}:
            raise ValueError(f"eval.limits: there is no task {min(unknown)}: limit some of {', '.join(tasks)}")

    def refuse_unlimited(self, examples: Mapping[str, int | None]) -> None:
        """Raise ValueError if ``until`` adds ``examples`` of a generated task without a limit (None)."""
        if self.until and (unlimited := [name for name, limit in examples.items() if limit is None]):
            raise ValueError(
                f"eval.until={self.until}: examples of {unlimited[0]} are generated, so set how many at most: "
                f"eval.limit=1000, or ++eval.limits.{unlimited[0]}=1000"
            )
