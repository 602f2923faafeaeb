"""What a run says of itself: figures by step, tables, pictures, checkpoints.

JSON lines are always written, W&B beside them when asked.  Only the first rank tracks.  A tracker that fails never
stops a run: it is named once, and the others go on.
"""

import errno
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from longctx.config import Track

Say = Callable[[str], None]
# By name; None is a figure that is not known.  A name's part before its first "/" is its group: comm, mem, eval;
# without one it is of training.
Figures = Mapping[str, float | None]
MANIFEST = "manifest.json"  # in a run's folder, says what exactly was run (recipes/common/manifest.py)
_UPLOAD_S = 300.0  # how long the end of a run may wait for W&B's server: what is left stays on disk, for `wandb sync`


@runtime_checkable
class Tracker(Protocol):
    """Where a run's figures go.  Steps grow: whoever has more to say of one says it in the same ``log``."""

    def log(self, figures: Figures, step: int) -> None:
        """All figures of ``step``."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table of ``step``; not of one before the last that was logged."""
        ...

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture's file, of ``step``."""
        ...

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        """A reference to ``folder`` (a checkpoint): nothing is copied.  Do not reuse a folder for other contents."""
        ...

    def finish(self) -> None:
        """The run has ended well."""
        ...


def start_tracking(
    track: Track,
    folder: Path,
    config: Mapping[str, Any],
    *,
    first: bool,
    say: Say,
    step: int = 0,
    run_id: str | None = None,
) -> tuple[Tracker, str | None]:
    """A tracker that goes on from ``step``, and the run's id, to be kept beside the step and given when it resumes.

    ``folder/metrics.jsonl`` forgets what it has of ``step`` and later, and then reads as if the run had never been
    interrupted: step 0 starts it anew.  ``config`` is all that one needs to do the run again.  Ranks that are not the
    ``first`` get a tracker that does nothing, and ``run_id`` as they gave it.

    Raises ValueError if ``folder`` cannot be written.
    """
    if not first:
        return Tracking({}, say), run_id
    run_id = run_id or secrets.token_hex(4)
    try:
        trackers: dict[str, Tracker] = {"metrics.jsonl": JsonLines(folder, step)}
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give the run a folder of yours") from error
    if track.backend == "wandb":
        try:
            trackers["wandb"] = Wandb(track, folder, config, run_id, say)
        except Exception as error:
            say(_failed("wandb", error))
    return Tracking(trackers, say), run_id


class Tracking:
    """Every one of ``trackers`` in turn; one that fails is named once and asked again the next time."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Say) -> None:
        self._trackers, self._say = trackers, say
        self._failed: set[str] = set()
        self._last = -1

    def log(self, figures: Figures, step: int) -> None:
        assert step > self._last, f"step {step} after {self._last}: a step is logged once, with all that is known of it"
        assert "step" not in figures, "the step is not among the figures"
        self._last = step
        self._each(lambda tracker: tracker.log(figures, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._each(lambda tracker: tracker.table(name, columns, rows, step))

    def image(self, name: str, path: Path, step: int) -> None:
        self._each(lambda tracker: tracker.image(name, path, step))

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        self._each(lambda tracker: tracker.artifact(name, kind, folder))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                tell(tracker)
            except Exception as error:
                if name not in self._failed:
                    self._say(_failed(name, error))
                self._failed.add(name)


def _failed(name: str, error: Exception) -> str:
    says = " ".join(str(error).split())
    return f"{name} failed ({type(error).__name__}: {says}); the run goes on, and does not say this again"


class JsonLines:
    """A line a step in ``metrics.jsonl``, a line a table in ``tables.jsonl``; pictures and checkpoints are files as is.

    A line is one write: whole in the file as soon as ``log`` returns, or not there.  JSON has no number for what is
    not finite: it is "nan", "inf" or "-inf" there, which ``float`` reads.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._tables = (_continued(folder / f"{name}.jsonl", step) for name in ("metrics", "tables"))

    def log(self, figures: Figures, step: int) -> None:
        _append(self._metrics, {"step": step, **{name: _plain(value) for name, value in figures.items()}})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        plain = [[_plain(cell) for cell in row] for row in rows]
        _append(self._tables, {"step": step, "table": name, "columns": list(columns), "rows": plain})

    def image(self, name: str, path: Path, step: int) -> None: ...

    def artifact(self, name: str, kind: str, folder: Path) -> None: ...

    def finish(self) -> None: ...


def _continued(path: Path, step: int) -> Path:
    """``path`` with its whole lines of steps before ``step`` alone; or as it was, if we are killed."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as kept:
        if path.exists():
            with path.open("rb") as lines:
                kept.writelines(line for line in lines if _is_before(line, step))
        kept.flush()
        os.fsync(kept.fileno())
    partial.replace(path)
    return path


def _is_before(line: bytes, step: int) -> bool:
    """Whether ``line`` is whole, and of a step before ``step``."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """One more line; OSError, and none of it, if there is no room for the whole."""
    line = json.dumps(values, allow_nan=False).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; what is neither text, a whole number nor nothing is asked for its float."""
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


class Wandb:
    """A W&B run in ``folder/wandb``: online if there is an API key, else offline; WANDB_MODE may ask for less.

    A run that resumes passes the steps that it does again a second time; online, W&B keeps the first.  Offline each
    start has a folder of its own under the one id, which ``wandb sync`` joins.
    """

    def __init__(self, track: Track, folder: Path, config: Mapping[str, Any], run_id: str, say: Say) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        # Without room W&B would move to a temporary folder, or lose records in a process of its own, without a word.
        with tempfile.TemporaryFile(dir=folder / "wandb") as probe:
            probe.write(bytes(4096))
        self._wandb = wandb
        self._run = wandb.init(
            project=track.project,
            group=track.group,
            name=track.name,
            tags=track.tags,
            notes=track.notes,
            job_type=track.job_type,
            config=dict(config),
            id=run_id,
            resume="allow",
            allow_val_change=True,
            mode=_mode(wandb),
            dir=folder,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=_UPLOAD_S),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if (folder / MANIFEST).is_file():
            there = shutil.copy2(folder / MANIFEST, self._run.dir)  # as it is now: the next start has another
            self._run.save(there, base_path=self._run.dir, policy="now")
        say(f"W&B run {run_id}: {self._run.url or f'offline, in {folder}/wandb'}")

    def log(self, figures: Figures, step: int) -> None:
        known = {_grouped(name): value for name, value in figures.items() if value is not None}
        self._run.log({"step": step, **known}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"step": step, _grouped(name): table}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, _grouped(name): self._wandb.Image(str(path))}, step=step)

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        artifact = self._wandb.Artifact(name, kind)
        artifact.add_reference(folder.resolve().as_uri(), checksum=False)
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()


def _grouped(name: str) -> str:
    return name if "/" in name else f"train/{name}"


def _mode(wandb: Any) -> Any:
    """What WANDB_MODE says; offline instead of online where there is no key, since W&B would stop and ask for one."""
    mode = wandb.setup().settings.mode
    return "offline" if mode == "online" and not wandb.login(verify=False, prompt=False) else mode
