"""Which blocks drop their first reduction: a value, saved beside the weights that were made for it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "spd_plan.json"


@dataclass(frozen=True)
class SPDPlan:
    """``dropped`` are the blocks, counted from 0, whose attention output is not reduced over ``tp`` ranks.

    ``own_norms``: in dropped blocks each rank has norm weights of its own.
    """

    layers: int
    tp: int
    dropped: tuple[int, ...] = ()
    own_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", tuple(sorted(set(self.dropped))))
        if wrong := [block for block in self.dropped if not 0 <= block < self.layers]:
            raise ValueError(f"spd: there is no block {wrong[0]}; the model's are 0 to {self.layers - 1}")
        if self.dropped and self.tp < 2:
            raise ValueError(
                "spd: one tensor-parallel rank has no reduction to drop; use mesh.tp=2 or more, or spd=none"
            )

    @property
    def share(self) -> float:
        """Of all blocks, how many drop."""
        return len(self.dropped) / self.layers

    def __str__(self) -> str:
        return f"{len(self.dropped)} of {self.layers} blocks dropped"


@dataclass(frozen=True)
class SavedPlan:
    """A plan in a model's folder.

    ``order``, all blocks as they are to be dropped, first the least sensitive; ``adapted`` those that have other
    weights where dropped; ``source``, what the model was made from.
    """

    plan: SPDPlan
    order: tuple[int, ...]
    adapted: tuple[int, ...]
    source: str

    def write(self, folder: Path) -> None:
        """Put the plan into ``folder``."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def saved_plan(folder: Path) -> SavedPlan | None:
    """The plan in ``folder``, if there is one.  Raises ValueError if it cannot be read."""
    if not (folder / FILE).is_file():
        return None
    try:
        told = json.loads((folder / FILE).read_text())
        plan = {**told["plan"], "dropped": tuple(told["plan"]["dropped"])}
        return SavedPlan(SPDPlan(**plan), tuple(told["order"]), tuple(told["adapted"]), told["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / FILE} is not a plan ({error}): adapt the model again with recipes.spd_adapt"
        ) from error


def ranked(scores: Sequence[float]) -> tuple[int, ...]:
    """All blocks, the least sensitive first (arXiv 2502.20727, 4.2.1)."""
    return tuple(sorted(range(len(scores)), key=lambda block: (scores[block], block)))


def within(order: Sequence[int], budget: float) -> tuple[int, ...]:
    """The first of ``order``, ``budget`` of them as a share of all, to the nearest whole block."""
    return tuple(order[: int(budget * len(order) + 0.5)])


def order_from(file: Path, layers: int, tp: int, fingerprint: str) -> tuple[int, ...]:
    """The order that the sensitivity.json ``file`` gives.  ValueError if it is of another model or tp degree."""
    told = read_sensitivity(file)
    if told["tp"] != tp:
        raise ValueError(f"{file} was measured at mesh.tp={told['tp']}, this is mesh.tp={tp}: measure it again at that")
    if told["fingerprint"] != fingerprint or len(told["blocks"]) != layers:
        raise ValueError(f"{file} was measured on another model ({told['model']}): use that, or measure it on this one")
    return ranked([block["score"] for block in told["blocks"]])


def read_sensitivity(file: Path) -> Mapping[str, Any]:
    """What recipes.spd_sensitivity wrote to ``file``.  Raises ValueError if it is not that."""
    try:
        told: dict[str, Any] = json.loads(file.read_text())
        told["tp"], told["fingerprint"], told["model"], [block["score"] for block in told["blocks"]]
    except OSError as error:
        raise ValueError(
            f"spd.sensitivity={file} cannot be read ({error.strerror}): give a file of recipes.spd_sensitivity"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"spd.sensitivity={file} is not a file of recipes.spd_sensitivity ({error})") from error
    return told
