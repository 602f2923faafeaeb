"""Find a run's whole checkpoints on disk and read their metadata, without importing torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.checksum import KEY, crc32_of_files, has_valid_checksum, with_checksum
from longctx.restricted_pickle import METADATA, files_named_in
from longctx.text_file import write_text

RUN = "run.json"
PARTIAL = ".partial"
_CHECKSUMS = "checksums"


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder written after ``step`` steps; names sort in the order of steps."""
    return f"step-{step:08}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, the oldest first; corrupt ones are included, unfinished ones are not."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def fault_of(checkpoint: Path) -> str:
    """Describe the first fault of a checkpoint folder: no valid run.json, or a file missing or of another size.

    Return the empty string if the checkpoint is whole.  Reads no file but run.json.
    """
    try:
        index: dict[str, Any] = json.loads((checkpoint / RUN).read_text())
        sizes = dict(index["files"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return f"it has no whole {RUN}"
    # Versions before 0.2 wrote neither checksums nor the checksum of run.json.
    if (KEY in index or _CHECKSUMS in index) and not (
        has_valid_checksum(index) and [*index.get(_CHECKSUMS, ())] == [*sizes]
    ):
        return f"{RUN} has changed since it was written"
    existing = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    wrong = [name for name, size in sizes.items() if existing.get(name) != size]
    return f"{wrong[0]} is missing or has another size" if wrong else ""


def content_fault_of(checkpoint: Path) -> str:
    """Describe the first fault of a checkpoint folder as `fault_of` does, but read every file and check its checksum.

    A file has a fault if its checksum differs from the one in run.json; version 0.1 wrote no checksums.  The index of
    tensors has a fault if it names classes or files that do not belong to the checkpoint.
    """
    if fault := fault_of(checkpoint):
        return fault
    index = read_metadata(checkpoint)
    checksums = index.get(_CHECKSUMS, {})
    actual = crc32_of_files(checkpoint / name for name in checksums)
    for name, crc in zip(checksums, actual, strict=True):
        if crc != checksums[name]:
            return f"{name} has changed since it was written"
    return foreign_content_of(checkpoint, index) if (checkpoint / METADATA).exists() else ""


def foreign_content_of(checkpoint: Path, index: Mapping[str, Any]) -> str:
    """Describe the first class or file in ``.metadata`` that does not belong to the checkpoint; "" if there is none.

    ``index`` is the content of run.json, which lists the checkpoint's files.
    """
    try:
        foreign = files_named_in(checkpoint / METADATA) - set(index["files"])
    except ValueError as error:
        return f"{METADATA} cannot be trusted: {error}"
    return f"{METADATA} refers to {min(foreign)}, which is not one of its files" if foreign else ""


def latest_whole(folder: Path, fault: Callable[[Path], str] = fault_of) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in ``folder`` (None if there is none), and why newer ones were skipped.

    A checkpoint is whole if ``fault`` finds none.  The second value has one line for each unfinished checkpoint, and
    one for each corrupt checkpoint that is newer than the returned one.
    """
    unfinished = sorted(folder.glob(f"*{PARTIAL}*"))
    passed_over = [f"{partial.name} was being written when the run ended" for partial in unfinished]
    for checkpoint in reversed(checkpoint_folders(folder)):
        reason = fault(checkpoint)
        if not reason:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} is corrupt: {reason}")
    return None, passed_over


def refuse_none_whole(folder: Path, place: Path | None, passed_over: Sequence[str]) -> None:
    """Raise ValueError if ``folder`` has checkpoints, but none is whole: a run would begin again and remove them.

    ``place`` and ``passed_over`` are the result of `latest_whole`.
    """
    if place is None and checkpoint_folders(folder):
        raise ValueError(
            f"{folder} has checkpoints, but none is whole ({'; '.join(passed_over)}): restore one to resume; to begin "
            "again, delete them or give another out="
        )


def write_index(checkpoint: Path, metadata: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    """Write run.json: ``metadata``, sizes and ``checksums`` (CRC-32 by name) of the files, and its own checksum."""
    sizes = {name: (checkpoint / name).stat().st_size for name in checksums}
    index = with_checksum({**metadata, "files": sizes, _CHECKSUMS: dict(checksums)})
    write_text(checkpoint / RUN, json.dumps(index, indent=1))


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of the checkpoint's run.json.

    Its keys include ``step``, ``data`` (the resume state of the training text), ``run_id`` and ``config``.
    """
    metadata: dict[str, Any] = json.loads((checkpoint / RUN).read_text())
    return metadata


def unchecked_line(checkpoint: Path) -> str:
    """Return a warning that the files of ``checkpoint`` were checked by size only; empty if it has checksums.

    Version 0.1 wrote none.
    """
    if _CHECKSUMS in read_metadata(checkpoint):
        return ""
    return f"{checkpoint} was written by a version without checksums: its files were checked by size only"
