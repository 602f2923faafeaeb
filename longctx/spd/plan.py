"""The set of blocks that drop their first reduction, saved with the weights that were repaired for it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.checksum import KEY, crc32_of_file, has_valid_checksum, with_checksum
from longctx.hf.checkpoint import ADAPTED, same_model
from longctx.model_shape import ModelShape
from longctx.text_file import write_text

FILE = "spd_plan.json"
_WEIGHTS = "weights_crc32"


@dataclass(frozen=True)
class SPDPlan:
    """Blocks that skip the all-reduce of their attention output over ``tp`` tensor-parallel ranks.

    ``dropped`` are numbers of blocks, counted from 0, in a model of ``layers`` blocks; duplicates are removed and the
    numbers sorted.  ``own_norms``: in blocks that drop, each rank has its own norm weights.

    Raises ValueError for a block that the model lacks, and for dropped blocks with ``tp`` below 2.
    """

    layers: int
    tp: int
    dropped: tuple[int, ...] = ()
    own_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", tuple(sorted(set(self.dropped))))
        if wrong := [block for block in self.dropped if not 0 <= block < self.layers]:
            raise ValueError(f"spd: the model has no block {wrong[0]}; use blocks 0 to {self.layers - 1}")
        if self.dropped and self.tp < 2:
            raise ValueError(
                "spd: one tensor-parallel rank has no reduction to drop; use mesh.tp=2 or more, or spd=none"
            )

    @property
    def share(self) -> float:
        """Fraction of all blocks that drop, 0 to 1."""
        return len(self.dropped) / self.layers

    def __str__(self) -> str:
        return f"{len(self.dropped)} of {self.layers} blocks dropped"


def refuse_unfit_shape(shape: ModelShape) -> None:
    """Raise ValueError for a model whose blocks cannot drop their first reduction."""
    reasons = {
        "LayerNorm, on which dropped reductions are not tested": shape.layer_norm,
        "a feed-forward network without gate, on which dropped reductions are not tested": not shape.gated,
        "a mixture of experts, in which each rank would choose experts by its own partial sum": shape.mixture
        is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"this model has {reason}: use a dense model such as Llama or Qwen3, or drop no block")


@dataclass(frozen=True)
class SavedPlan:
    """A plan in a model's folder.

    ``order`` lists all blocks in the order in which they drop.  The ``adapted`` blocks have repaired weights and come
    first; the one whose drop alone changes predictions least is the first.  The others follow, the least sensitive
    first.  ``source`` is the fingerprint of the model that was adapted.
    """

    plan: SPDPlan
    order: tuple[int, ...]
    adapted: tuple[int, ...]
    source: str

    def write(self, folder: Path) -> None:
        """Write the plan to ``folder``/spd_plan.json, with a checksum of itself.

        If the adapted weights are in ``folder`` already, the file also gets a checksum of them.
        """
        weights = {_WEIGHTS: crc32_of_file(folder / ADAPTED)} if (folder / ADAPTED).is_file() else {}
        write_text(folder / FILE, json.dumps(with_checksum({**asdict(self), **weights}), indent=1) + "\n")


def saved_plan(folder: Path) -> SavedPlan | None:
    """Return the plan in ``folder``, or None without one.  Raises ValueError if the file cannot be read as a plan."""
    if not (folder / FILE).is_file():
        return None
    try:
        values = json.loads((folder / FILE).read_bytes())
        if {KEY, _WEIGHTS} & set(values) and not has_valid_checksum(values):
            raise ValueError("it has changed since it was written")
        plan = {**values["plan"], "dropped": tuple(values["plan"]["dropped"])}
        return SavedPlan(SPDPlan(**plan), tuple(values["order"]), tuple(values["adapted"]), values["source"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / FILE} is not a plan ({error}): adapt the model again with recipes.spd_adapt"
        ) from error


def refuse_changed_weights(folder: Path) -> None:
    """Raise ValueError if the adapted weights in ``folder`` are not those that were written with the plan.

    ``folder`` must have a plan.  Version 0.1 wrote no checksum; such a folder is not checked.
    """
    crc = json.loads((folder / FILE).read_bytes()).get(_WEIGHTS)
    if crc is not None and (not (folder / ADAPTED).is_file() or crc32_of_file(folder / ADAPTED) != crc):
        raise ValueError(
            f"{folder / ADAPTED} is missing, or has changed since it was written: copy it again, or adapt the model "
            "again with recipes.spd_adapt"
        )


def rank_blocks(scores: Sequence[float]) -> tuple[int, ...]:
    """Return all blocks in the order of their ``scores``, the least sensitive first (arXiv 2502.20727, 4.2.1)."""
    return tuple(sorted(range(len(scores)), key=lambda block: (scores[block], block)))


def within(order: Sequence[int], budget: float) -> tuple[int, ...]:
    """Return the first blocks of ``order``: the share ``budget`` (0 to 1) of all blocks, rounded to a whole number."""
    return tuple(order[: int(budget * len(order) + 0.5)])


def least_budget(layers: int) -> float:
    """Return the smallest budget, in thousandths, with which `within` takes at least one of ``layers`` blocks.

    `within` rounds, so that half a block's share is enough: 0.017 for 30 layers.
    """
    return math.ceil(500 / layers) / 1000


def order_from(file: Path, layers: int, tp: int, fingerprint: str) -> tuple[int, ...]:
    """The block order of a sensitivity.json ``file``, least sensitive first.

    Raises ValueError if the file cannot be read, or was measured on another model or another degree of tensor
    parallelism.
    """
    measured = read_sensitivity(file)
    if measured["tp"] != tp:
        raise ValueError(
            f"{file} was measured at mesh.tp={measured['tp']}, but this is mesh.tp={tp}: use that mesh, or "
            "measure again with recipes.spd_sensitivity"
        )
    if not same_model(measured["fingerprint"], fingerprint) or len(measured["blocks"]) != layers:
        raise ValueError(
            f"{file} was measured on another model ({measured['model']}): use that model, or measure this one with "
            "recipes.spd_sensitivity"
        )
    return rank_blocks([float(block["score"]) for block in measured["blocks"]])


def read_sensitivity(file: Path) -> Mapping[str, Any]:
    """The contents of a sensitivity.json, as recipes.spd_sensitivity writes it.

    Raises ValueError if ``file`` cannot be read or lacks the keys that `order_from` needs.
    """
    try:
        measured: dict[str, Any] = json.loads(file.read_text())
        measured["tp"], measured["fingerprint"], measured["model"]
        [float(block["score"]) for block in measured["blocks"]]
    except OSError as error:
        raise ValueError(
            f"spd.sensitivity={file} cannot be read ({error.strerror}): give a file of recipes.spd_sensitivity"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"spd.sensitivity={file} is not a file of recipes.spd_sensitivity ({error}): give another, or measure again"
        ) from error
    return measured
