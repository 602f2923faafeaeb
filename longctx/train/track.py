"""Track a run: metrics and tables in JSON lines; with W&B, also pictures and checkpoints.

JSON lines are always written.  Only the first rank tracks.  A tracker that fails never stops a run: its error is
reported once, and the other trackers continue.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from longctx.config import Track
from longctx.text_file import name_in_errors

Say = Callable[[str], None]
# Values by name; None is a value that is not known.  "comm/exposed_s" is in the group comm (others are mem and eval);
# a name without "/" is in the group train.
Figures = Mapping[str, float | None]
MANIFEST = "manifest.json"  # in a run's folder: command, settings, source (recipes/common/manifest.py)
# Longest wait for W&B's server at the start; without it, the run is recorded offline.  WANDB_INIT_TIMEOUT overrides it.
_CONNECT_S = 30.0
# The same at the end; the rest stays on disk, for `wandb sync`.  A job that is warned two minutes before its end needs
# most of them for its last step and checkpoint.  WANDB_FINISH_TIMEOUT overrides it.
_UPLOAD_S = 45.0


@runtime_checkable
class Tracker(Protocol):
    """A destination of a run's metrics.  Steps increase from call to call; ``log`` is called once a step."""

    def log(self, figures: Figures, step: int) -> None:
        """Record all metrics of ``step``."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Record the table ``name`` with ``rows`` at ``step``, which is not before the last logged step."""
        ...

    def image(self, name: str, path: Path, step: int) -> None:
        """Record the picture in the file ``path`` as ``name`` at ``step``; JSON lines leave pictures out."""
        ...

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        """Record a reference, called ``name``, to ``folder``, without copying it; its contents must not change later.

        ``kind`` is the type of the artifact, such as a checkpoint.
        """
        ...

    def finish(self) -> None:
        """Close the tracker of a run that has ended well."""
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
    """Return a tracker that continues from ``step``, and the run's id; the caller saves the id and passes it on resume.

    ``metrics.jsonl`` and ``tables.jsonl`` in ``folder`` lose their lines of ``step`` and later, and then read as if
    the run had not been interrupted; step 0 empties them.  ``config`` has the settings that reproduce the run.
    ``run_id=None`` draws a new id.  Only the ``first`` rank tracks: other ranks get a tracker that does nothing, and
    ``run_id`` unchanged.  ``say`` receives messages.

    Raises ValueError if ``folder`` cannot be written.
    """
    if not first:
        return Tracking({}, say), run_id
    run_id = run_id or secrets.token_hex(4)
    try:
        trackers: dict[str, Tracker] = {"metrics.jsonl": JsonLines(folder, step)}
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give the run a writable folder") from error
    if track.backend == "wandb":
        try:
            if wandb_is_disabled():
                say("WANDB_MODE=disabled: the figures go to metrics.jsonl only")
            else:
                trackers["wandb"] = Wandb(track, folder, config, run_id, say)
        except Exception as error:
            say(_failure_line("wandb", error))
    return Tracking(trackers, say), run_id


class Tracking:
    """Calls each of ``trackers`` in turn.

    The first error of a tracker is reported through ``say``; the tracker is called again the next time.
    """

    def __init__(self, trackers: Mapping[str, Tracker], say: Say) -> None:
        self._trackers, self._say = trackers, say
        self._failed: set[str] = set()
        self._last = -1

    def log(self, figures: Figures, step: int) -> None:
        assert step > self._last, f"step {step} after {self._last}: a step is logged once, with all of its figures"
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

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:
                if name not in self._failed:
                    self._say(_failure_line(name, error))
                self._failed.add(name)


def _failure_line(name: str, error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{name} failed ({type(error).__name__}: {message}); the run continues, and does not report this again"


class JsonLines:
    """Writes one line per step to ``metrics.jsonl``, and one per table to ``tables.jsonl``, both in ``folder``.

    Both files first lose their lines of ``step`` and later.  Pictures and checkpoints are files already, and are not
    recorded.  A line is one write: when ``log`` returns, it is whole in the file, or absent after an error.  JSON has
    no numbers that are not finite; they are the strings "nan", "inf" and "-inf", which ``float`` reads.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._tables = (_keep_before(folder / f"{name}.jsonl", step) for name in ("metrics", "tables"))

    def log(self, figures: Figures, step: int) -> None:
        _append(self._metrics, {"step": step, **to_json(figures)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        _append(self._tables, {"step": step, "table": name, "columns": list(columns), "rows": to_json(rows)})

    def image(self, name: str, path: Path, step: int) -> None: ...

    def artifact(self, name: str, kind: str, folder: Path) -> None: ...

    def finish(self) -> None: ...


def _keep_before(path: Path, step: int) -> Path:
    """Reduce ``path`` to its whole lines from before ``step``, or make it empty if it is missing; return ``path``.

    A process that is killed meanwhile leaves ``path`` unchanged.
    """
    new = path.with_suffix(".partial")
    with name_in_errors(path), new.open("wb") as output:
        if path.exists():
            with path.open("rb") as lines:
                output.writelines(line for line in lines if _is_before(line, step))
        output.flush()
        os.fsync(output.fileno())
    new.replace(path)
    return path


def _is_before(line: bytes, step: int) -> bool:
    """Return True if ``line`` is whole and belongs to a step before ``step``."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """Append ``values`` as one line of JSON to ``path``.

    Raises OSError, and leaves nothing of the line, if the disk has no room for all of it.
    """
    line = json.dumps(values, allow_nan=False).encode() + b"\n"
    with name_in_errors(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def to_json(value: Any) -> Any:
    """Convert ``value`` for JSON: text, integers and None unchanged, finite numbers as floats, nan and inf as text.

    Mappings and sequences are converted item by item.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return list(map(to_json, value))
    number = float(value)
    return number if math.isfinite(number) else str(number)


class Wandb:
    """A W&B run in ``folder/wandb``: online if an API key exists, otherwise offline; WANDB_MODE may restrict that.

    A resumed run logs repeated steps a second time; online, W&B keeps the first values.  Offline, each start writes a
    separate folder under the same id, and ``wandb sync`` joins them.
    """

    def __init__(self, track: Track, folder: Path, config: Mapping[str, Any], run_id: str, say: Say) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        # On a full disk W&B silently moves to a temporary folder or loses records in its own process, so try first.
        with tempfile.TemporaryFile(dir=folder / "wandb") as probe:
            probe.write(bytes(4096))
        self._wandb = wandb
        begin = partial(
            wandb.init,
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
            dir=folder,
            settings=wandb.Settings(console="off", silent=True, **_waits(wandb)),
        )
        try:
            self._run = begin(mode=_mode(wandb))
        except wandb.errors.CommError as error:  # compute nodes often have no network
            fault = "refuses the key" if isinstance(error, wandb.errors.AuthenticationError) else "cannot be reached"
            say(f"W&B {fault} ({' '.join(str(error).split())}): the run is recorded offline")
            wandb.teardown(exit_code=1)  # ends the attempt, which has the run's id
            self._run = begin(mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if (folder / MANIFEST).is_file():
            copy = shutil.copy2(folder / MANIFEST, self._run.dir)  # a copy, because the next start replaces the file
            self._run.save(copy, base_path=self._run.dir, policy="now")
        say(f"W&B run {run_id}: {self._run.url or f'offline, in {folder}/wandb'}")

    def log(self, figures: Figures, step: int) -> None:
        known = {_with_group(name): value for name, value in figures.items() if value is not None}
        self._run.log({"step": step, **known}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"step": step, _with_group(name): table}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, _with_group(name): self._wandb.Image(str(path))}, step=step)

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        artifact = self._wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), kind)  # W&B refuses other characters
        artifact.add_reference(folder.resolve().as_uri(), checksum=False)
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()


def _waits(wandb: Any) -> dict[str, Any]:
    """Return the longest waits for W&B's server, by W&B's setting, except those that the user has set for W&B."""
    set_by_user = wandb.setup().settings.model_fields_set
    waits = {"init_timeout": _CONNECT_S, "finish_timeout": _UPLOAD_S}
    return {name: seconds for name, seconds in waits.items() if name not in set_by_user}


def _with_group(name: str) -> str:
    return name if "/" in name else f"train/{name}"


def wandb_is_disabled() -> bool:
    """Return True if WANDB_MODE turns W&B off."""
    import wandb

    return bool(wandb.setup().settings.mode == "disabled")


def _mode(wandb: Any) -> Any:
    """Return the mode that WANDB_MODE sets, or offline for online without an API key, for which W&B would prompt."""
    mode = wandb.setup().settings.mode
    return "offline" if mode == "online" and not wandb.login(verify=False, prompt=False) else mode
