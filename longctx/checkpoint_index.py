"""Find a run's whole checkpoints on disk and read their metadata, without importing torch."""

import json
from pathlib import Path
from typing import Any

RUN = "run.json"
PARTIAL = ".partial"


def folder_name(step: int) -> str:
    """Name of the checkpoint folder written after ``step`` steps; names sort in the order of steps."""
    return f"step-{step:08}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoint folders in ``folder``, the oldest first; corrupt ones included, unfinished ones not."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def latest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in ``folder`` (None if there is none), and why newer ones were passed over.

    The second value has one line for each unfinished checkpoint, and one for each corrupt checkpoint that is newer
    than the returned one.
    """
    unfinished = sorted(folder.glob(f"*{PARTIAL}*"))
    passed_over = [f"{partial.name} was being written when the run ended" for partial in unfinished]
    for checkpoint in reversed(checkpoint_folders(folder)):
        fault = fault_of(checkpoint)
        if not fault:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} is corrupt: {fault}")
    return None, passed_over


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of the checkpoint's run.json.

    Its keys include ``step``, ``data`` (the resume state of the training text), ``run_id`` and ``config``.
    """
    metadata: dict[str, Any] = json.loads((checkpoint / RUN).read_text())
    return metadata


def fault_of(checkpoint: Path) -> str:
    """Describe the first fault of a checkpoint folder: no readable run.json, or a file missing or of another size.

    Return the empty string if the checkpoint is whole.
    """
    try:
        sizes: dict[str, int] = json.loads((checkpoint / RUN).read_text())["files"]
    except (OSError, KeyError, json.JSONDecodeError):
        return f"it has no whole {RUN}"
    existing = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    wrong = [name for name, size in sizes.items() if existing.get(name) != size]
    return f"{wrong[0]} is missing or has another size" if wrong else ""
