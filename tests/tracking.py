"""Start a tracker, log sample figures, and read back what was logged (JSON lines and W&B records)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longctx.config import Track
from longctx.train.track import Tracker, start_tracking

NONE = Track()
WANDB = Track(
    "wandb", project="long", group="sweep", name="first", tags=("cp", "8k"), notes="a, (note)", job_type="train"
)
CONFIG = {"mesh": {"ring": 2, "tp": 3}, "commit": "abc123", "optim": {"lr": 3e-4}, "python": "3.11"}


def figures(step: int) -> dict[str, float | None]:
    return {"loss": 7.0 / (step + 1), "tokens": 11 * step, "comm/exposed_s": 0.25, "mem/peak_bytes": 2**40, "mfu": None}


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    """Return the objects of ``folder``/``name``.jsonl; fails on NaN and infinity, which JSON lacks."""
    text = (folder / f"{name}.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def start(folder: Path, track: Track = NONE, **more) -> tuple[Tracker, str | None, list[str]]:
    """Return a tracker on the first rank, its run id, and the list that its messages are appended to."""
    messages: list[str] = []
    tracker, run_id = start_tracking(track, folder, CONFIG, first=True, say=messages.append, **more)
    return tracker, run_id, messages


@contextmanager
def wandb_below(home: Path) -> Iterator[None]:
    """Context manager: use W&B without an account; everything that it writes is below ``home``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(home / "none"))
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name))
        yield
        tear_down_wandb()


def tear_down_wandb() -> None:
    """Close W&B in this process, if it is imported; its next start reads the environment again."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def records(folder: Path) -> list[dict]:
    """Return all records of the single W&B run in ``folder``, as read by W&B's own command."""
    (file,) = folder.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def of_kind(kind: str, read: list[dict]) -> list[dict]:
    return [record[kind] for record in read if record["type"] == kind]


def history(read: list[dict]) -> list[dict]:
    return [{"_step": row["step"]["num"], **row["item"]} for row in of_kind("history", read)]
