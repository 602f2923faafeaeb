"""Output paths: names of files and folders, checks that they can be written, results as JSON."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.text_file import write_text
from longctx.train.track import to_json

_SUFFIXES = {"picture": (".svg", ".png", ".pdf"), "fitted": (".yaml", ".yml")}  # by setting


def is_file_name(out: str) -> bool:
    """Return True if ``out`` has the suffix of a file that recipes write, such as .json; else it is a run's folder."""
    return Path(out).suffix in (".json", ".jsonl", ".yaml", ".yml", ".md", ".svg", ".png", ".pdf")


# Settings of files and folders to write.
WRITTEN = ("out", "picture", "settings", "json", "markdown", "fitted", "session.save")


def numbered_out(out: str, number: int | str) -> str:
    """Return the ``out`` of run ``number`` of a sweep: ``a`` becomes ``a/3``, ``a/x.json`` becomes ``a/3/x.json``."""
    path = Path(out)
    return str(path.parent / str(number) / path.name) if is_file_name(out) else str(path / str(number))


def refuse_unwritable(out: str | None, name: str = "out", suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError unless a file can be written at ``out``, the setting ``name``; creates nothing.

    None is accepted.  The file's name must end in one of ``suffixes``.  The default depends on ``name``: the formats of
    a picture or YAML file (`_SUFFIXES`), else .json.
    """
    if out is None:
        return
    suffixes = suffixes or _SUFFIXES.get(name, (".json",))
    path = Path(out).expanduser()
    if path.is_dir():
        raise ValueError(f"{name}={out} is a folder: give the name of a file, such as {name}={out}/result{suffixes[0]}")
    if path.suffix not in suffixes:
        raise ValueError(
            f"{name}={out} is not the name of a {' or '.join(suffixes)} file: use "
            f"{name}={path.with_suffix(suffixes[0])}"
        )
    _refuse_read_only(path.parent, f"{name}={out}")


def refuse_unwritable_folder(out: str, name: str = "out") -> None:
    """Raise ValueError unless ``out``, the setting ``name``, is a writable folder or can be made; creates nothing."""
    _refuse_read_only(Path(out).expanduser(), f"{name}={out}")


def refuse_folder_in_memory(out: str, name: str) -> None:
    """Raise ValueError if ``out``, the setting ``name``, is in a file system that keeps its files in memory."""
    import psutil

    folder = nearest_existing(Path(out).expanduser()).resolve()
    systems = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    system = next((systems[place] for place in (folder, *folder.parents) if place in systems), None)
    if system in ("tmpfs", "ramfs", "devtmpfs"):
        raise ValueError(f"{name}={out} is in a {system}, which is memory: give a folder on a disk")


def _refuse_read_only(folder: Path, setting: str) -> None:
    """Raise ValueError unless a page can be written to a file in ``folder``, or in its nearest parent that exists."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"{setting} cannot be written ({error.strerror}): give a writable folder") from error


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest of its parents that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def read_json(file: str | Path, fix: str, name: str = "") -> Any:
    """Return the content of the JSON ``file``; raise ValueError with its ``name`` (its path) and ``fix`` if damaged."""
    try:
        return json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name or file} is damaged ({error}): {fix}") from error


def write_json(out: str, result: Mapping[str, object]) -> None:
    """Write ``result`` to ``out`` as JSON, one line per key; the file appears whole or not at all.

    JSON has no numbers that are not finite; they are the strings "nan", "inf" and "-inf", which ``float`` reads.
    """
    lines = (f"  {json.dumps(key)}: {json.dumps(to_json(value), allow_nan=False)}" for key, value in result.items())
    write_text(Path(out), "{\n" + ",\n".join(lines) + "\n}\n")
