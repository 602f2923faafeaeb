"""A run's checkpoints on disk: which of them are whole, and what was written with them.  No torch: anyone may ask."""

import json
from pathlib import Path
from typing import Any

RUN = "run.json"
PARTIAL = ".partial"


def name_of(step: int) -> str:
    """The folder of the checkpoint behind ``step`` steps; names sort as steps do."""
    return f"step-{step:08}"


def places(folder: Path) -> list[Path]:
    """Checkpoints in their places in ``folder``, the oldest first."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in ``folder``, if there is one; and of those that were passed over, why."""
    passed = [f"{left.name} was being written when the run ended" for left in sorted(folder.glob(f"*{PARTIAL}*"))]
    for place in reversed(places(folder)):
        wrong = fault_of(place)
        if not wrong:
            return place, passed
        passed.append(f"{place.name} is torn: {wrong}")
    return None, passed


def about(place: Path) -> dict[str, Any]:
    """What was written with the checkpoint: its ``step``, ``data`` (where the text stands), ``run_id``, ``config``."""
    found: dict[str, Any] = json.loads((place / RUN).read_text())
    return found


def fault_of(place: Path) -> str:
    """What is wrong with the checkpoint; empty if nothing is."""
    try:
        sizes: dict[str, int] = json.loads((place / RUN).read_text())["files"]
    except (OSError, KeyError, json.JSONDecodeError):
        return f"it has no whole {RUN}"
    there = {file.name: file.stat().st_size for file in place.iterdir()}
    wrong = [name for name, size in sizes.items() if there.get(name) != size]
    return f"{wrong[0]} is missing or not of its size" if wrong else ""
