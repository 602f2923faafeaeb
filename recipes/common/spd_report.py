"""The share of blocks that a report of eval.run allows to drop a reduction."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AllowedDrop:
    """A share of blocks that may drop a reduction with ``tp`` tensor-parallel ranks (None: any number).

    ``why`` is a line for the user that gives the reason, empty if the user gave the share.  ``repaired`` is the name
    of the repaired model to which alone a report's verdict applies, empty if it applies to the model without repair
    (None: the user gave the share).
    """

    share: float
    tp: int | None = None
    why: str = ""
    repaired: str | None = None

    @property
    def settings(self) -> str:
        """The settings that drop these blocks, in words, for `share` of the blocks."""
        ranked = f"spd=ranked spd.budget={self.share:g} spd.sensitivity=FILE"
        saved = f"spd=saved spd.budget={self.share:g}"
        if self.repaired is None:
            return f"{ranked}, or an adapted model with {saved}"
        return f"model=FOLDER {saved}, with the folder of {self.repaired}" if self.repaired else ranked


NO_DROP = AllowedDrop(0.0)


def axes_of(mesh: str) -> dict[str, int]:
    """Return the ranks of each axis that ``mesh`` names in words, such as "tp=3 ring=2"."""
    return {axis: int(ranks) for axis, ranks in re.findall(r"(\w+)=(\d+)", mesh)}


def read_allowed_drop(setting: str, model: str) -> AllowedDrop:
    """Return the share that ``setting`` allows to drop: it is a share from 0 to 1, or a report.json of eval.run.

    A report allows the largest share among its variants with the verdict "no worse" on average, for the
    tensor-parallel degree of that variant; 0 if no variant has this verdict.

    Raises ValueError, with the fix, for any other text, and for a report whose baseline is not the model named
    ``model``, or drops or rounds reductions.
    """
    try:
        share = float(setting)
    except ValueError:  # a path
        share = None
    if share is not None:
        if not 0 <= share <= 1:
            raise ValueError(
                f"allowed_drop={setting} is not a share: use a number from 0 to 1, or a report.json of eval.run"
            )
        return AllowedDrop(share)
    try:
        report = json.loads(Path(setting).expanduser().read_text(encoding="utf-8"))
        of_model = {name: one for name, one in report["variants"].items() if one["dropped"]}
        baseline = next(iter(report["variants"].values()))
        is_plain = not baseline["dropped"] and baseline.get("reduce", "float32") == "float32"
        decided = {
            name: (float(one["dropped"]), axes_of(one["mesh"])["tp"])
            for name, one in of_model.items()
            # A variant that drops reductions between context ranks (sharded decoding) says nothing about mesh.tp.
            if report["average"][name]["verdict"] == "no worse" and "tp" in axes_of(one["mesh"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"allowed_drop={setting} is not a report ({error!r}): use 0 to 1, or a report.json of eval.run on "
            "variants with dropped reductions"
        ) from error
    if baseline["model"] != model:
        raise ValueError(
            f"allowed_drop={setting} is a report on {baseline['model']}, not on {model}: use a report on {model}"
        )
    if not is_plain:
        raise ValueError(
            f"allowed_drop={setting}: the report's baseline drops or rounds reductions itself: use a report whose "
            "baseline does neither"
        )
    if not decided:
        on_tp = {
            name: report["average"][name]["verdict"] for name, one in of_model.items() if "tp" in axes_of(one["mesh"])
        }
        verdicts = ", ".join(f"{name}: {verdict}" for name, verdict in on_tp.items()) or "none drops at mesh.tp above 1"
        return AllowedDrop(0.0, None, f"{setting}: no variant with dropped reductions is no worse ({verdicts})")
    name, (share, tp) = max(decided.items(), key=lambda item: item[1])
    rests_on = report["average"][name].get("rests_on") or {}
    caution = "".join(f"; without {task} {verdict}" for task, verdict in rests_on.items())
    variant = of_model[name]
    repaired = str(variant["model"]) if variant.get("repaired") else ""
    of = f" of the repaired model {repaired}" if repaired else ""
    why = f"{setting}: up to {share:.0%} of the blocks{of} may drop at mesh.tp={tp} ({name}{caution})"
    return AllowedDrop(share, tp, why, repaired)
