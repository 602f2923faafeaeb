"""The file in a folder of saved pages that records their model, mesh and page size."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longctx.checksum import KEY, has_valid_checksum, with_checksum
from longctx.hf.checkpoint import same_model
from longctx.text_file import write_text

VERSION = 1  # format of the files
INDEX = "pages.json"
_NEW_INDEXES = {f"{INDEX}.partial", f"{INDEX}.coming"}  # left by a killed server; .coming: of earlier versions
LOCK = ".lock"  # held by the server that uses the folder


@dataclass(frozen=True)
class PageOrigin:
    """The settings that saved pages depend on: the model's fingerprint and dtype, the mesh, and the tokens per page."""

    model: str
    dtype: str
    mesh: str
    page: int
    version: int = VERSION


def refuse_other_pages(folder: Path, origin: PageOrigin, setting: str) -> None:
    """Raise ValueError unless ``folder`` is new, empty or has pages of the same ``origin``.

    ``setting`` names the folder in messages.
    """
    if not folder.exists():
        return
    is_new = folder.is_dir() and {file.name for file in folder.iterdir()} <= {LOCK, *_NEW_INDEXES}
    if not is_new and not (folder / INDEX).is_file():
        raise ValueError(f"{setting} has other files than the saved pages of a server: use an empty or new folder")
    if not (folder / INDEX).is_file():
        return
    saved = _read(folder / INDEX, setting)
    for name, value in asdict(origin).items():
        if saved[name] != value and not (name == "model" and same_model(saved[name], value)):
            raise ValueError(
                f"{setting} has pages of {name} {saved[name]}, and this server's {name} is {value}: use another "
                "folder, or the settings of the server that saved them"
            )


def _read(file: Path, setting: str) -> dict[str, Any]:
    """Return the content of the index ``file``.  Raises ValueError if it has changed since it was written."""
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{setting}: {INDEX} is corrupt ({error}): delete the folder") from error
    keys = {KEY, *(one.name for one in fields(PageOrigin))}
    if not (isinstance(saved, dict) and has_valid_checksum(saved) and saved.keys() == keys):
        raise ValueError(f"{setting}: {INDEX} has changed since it was written: delete the folder")
    return saved


def write_origin(folder: Path, origin: PageOrigin) -> None:
    """Create ``folder`` and write the ``origin`` of its pages to a file, which appears whole or not at all."""
    write_text(folder / INDEX, json.dumps(with_checksum(asdict(origin))))
