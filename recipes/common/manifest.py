"""The manifest of a run: what is needed to run it again and to compare it with other runs.

A run whose ``out`` is a folder has ``manifest.json`` in it.  A run that writes ``x.json`` has ``x.manifest.json``
next to it.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from longctx.data.files import paths_of
from longctx.data.identity import digest
from longctx.hf.checkpoint import fingerprint
from longctx.text_file import write_text
from longctx.train.track import MANIFEST
from recipes.common.cli import is_first
from recipes.common.lock import hold, lock_beside
from recipes.common.places import is_file_name
from recipes.common.provenance import ROOT, diff_of, hardware, package_versions, provenance
from recipes.common.settings import as_dict, mapping_at, mappings_at


class Manifest(TypedDict, total=False):
    """Content of manifest.json: the command, its settings, and what the run depended on.

    ``config`` is the whole composed configuration.  ``weights`` and ``data`` map the paths of model folders and of
    files to their digests, ``packages`` names to versions.  ``diff`` has the uncommitted changes of the source code.
    ``folder`` is the working directory; ``out`` is absolute.
    """

    command: str
    commit: str
    processor: str
    cores: str
    python: str
    torch: str
    module: str
    overrides: list[str]
    config: dict[str, object]
    diff: str
    packages: dict[str, str]
    weights: dict[str, str]
    data: dict[str, str]
    seeds: dict[str, int]
    mesh: dict[str, int]
    hardware: dict[str, object]
    folder: str
    out: str
    began: str


REPLACED_FILES = ("metrics.jsonl", "tables.jsonl")  # which the first line of a new run replaces

# Fields that other recipes read -> their types.
_KINDS = {"module": str, "out": str, "folder": str, "diff": str, "overrides": list, "config": dict, "data": dict,
          "packages": dict, "hardware": dict}  # fmt: skip


@contextmanager
def record(config: DictConfig, recipe: str, weights: Iterable[Path] = (), read: Iterable[Path] = ()) -> Iterator[None]:
    """Lock the ``out`` of a run of ``recipe`` until the block ends, and write the manifest of the run that begins now.

    ``weights`` are the folders of the models that the run starts from.  ``read`` are files that it reads although no
    setting names them.  Without ``out`` this does nothing; of a launcher's ranks, only the first one locks and writes.

    Raises ValueError if another process is writing to ``out``, and for a file in the settings that does not exist.
    """
    if not config.get("out"):
        yield
        return
    out = Path(config.out).absolute()
    manifest = _manifest(config, recipe, out, weights, read) if is_first() else {}  # raises before `hold` makes folders
    with hold(lock_of(out), f"out={config.out}"):
        if is_first():
            write_text(manifest_file(out), json.dumps(manifest, indent=1) + "\n")
        yield


def _manifest(
    config: DictConfig, recipe: str, out: Path, weights: Iterable[Path], read: Iterable[Path]
) -> dict[str, object]:
    values = as_dict(config)
    cache = mapping_at(values, "model").get("cache")
    return {
        **provenance(),
        "module": recipe,
        "overrides": list(HydraConfig.get().overrides.task),
        "config": values,
        "diff": diff_of(ROOT),
        "packages": package_versions(),
        "weights": {
            str(folder.absolute()): fingerprint(folder, str(cache) if cache else None)
            for folder in sorted(set(weights))
        },
        "data": {str(path): digest(path) for path in sorted({*_read_by(values), *(path.absolute() for path in read)})},
        "seeds": {name: value for name, value in flat(values).items() if name.rpartition(".")[2] == "seed"},
        "mesh": values.get("mesh", {}),
        "hardware": hardware(),
        "folder": str(Path.cwd()),
        "out": str(out),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def manifest_file(out: Path) -> Path:
    """Return the path of a run's manifest by its ``out``: a/manifest.json for a, a/x.manifest.json for a/x.json."""
    return out.with_suffix(f".{MANIFEST}") if is_file_name(str(out)) else out / MANIFEST


def lock_of(out: Path) -> Path:
    """Return the path of a run's lock file by its ``out``: a/.lock for a, a/.x.json.lock for a/x.json."""
    return lock_beside(out) if is_file_name(str(out)) else out / ".lock"


def refuse_other_recipe(out: str | None, recipe: str, replaces: Iterable[str] = REPLACED_FILES) -> None:
    """Raise ValueError if ``out`` belongs to a recipe other than ``recipe``, or is a file that no recipe wrote.

    A folder without a manifest belongs to no recipe.  It is refused if it is the folder of a model, or has one of the
    files or folders ``replaces``, which the run would replace.
    """
    if not out:
        return
    _refuse_shared_manifest(Path(out))
    if not Path(out).exists():
        return
    try:
        manifest = _read(Path(out))
        owner = manifest["module"] if is_file_name(out) or not is_file_name(manifest["out"]) else None
    except (OSError, KeyError, TypeError, ValueError):
        owner = None
    if owner not in (recipe, None):
        raise ValueError(f"out={out} belongs to a run of {owner}: give {recipe} another out=")
    if owner is None and Path(out, "config.json").is_file():
        raise ValueError(f"out={out} is the folder of a model: give {recipe} another out=")
    if owner is None and (lost := [name for name in replaces if Path(out, name).exists()]):
        raise ValueError(
            f"out={out} has {lost[0]}, which {recipe} did not write and would replace: move it away, or give another "
            "out="
        )
    if owner is None and is_file_name(out):
        raise ValueError(f"out={out} exists, and was not written by {recipe}: give another file, or move it away")


def _refuse_shared_manifest(out: Path) -> None:
    """Raise ValueError if another file has the manifest that a run with the file ``out`` would write."""
    if not is_file_name(str(out)):
        return
    file = manifest_file(out)
    try:
        other = Path(json.loads(file.read_text(encoding="utf-8"))["out"]).name
    except (OSError, KeyError, TypeError, ValueError):
        return
    if other != out.name and out.with_name(other).exists():
        raise ValueError(
            f"out={out} would replace the manifest of {other}, {file.name}: use a name that differs before the ending"
        )


def manifest_of(run: str) -> Manifest:
    """Return the manifest of a run, given its folder or its ``out``.  Raises ValueError if there is no valid one."""
    try:
        manifest = _read(Path(run).expanduser())
        if wrong := [name for name, kind in _KINDS.items() if not isinstance(manifest.get(name), kind)]:
            raise ValueError(f"it has no valid {wrong[0]}")
        return manifest
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not a run: its manifest cannot be read ({error}); give a run's folder") from error


def _read(path: Path) -> Manifest:
    """Read the manifest of ``path``: an ``out``, or a folder in which only one file has a manifest.

    Version 0.1 wrote a file's manifest to ``manifest.json``.  There the manifest of the next run in the folder replaced
    it.
    """
    file = manifest_file(path)
    beside = [path.with_name(MANIFEST)] if is_file_name(str(path)) else list(path.glob(f"*.{MANIFEST}"))
    first = [each for each in beside if not re.search(rf"-again(-\d+)?\.{MANIFEST}$", each.name)]
    beside = first if len(first) == 1 else beside  # without runs that recipes.reproduce has made
    if not file.is_file() and len(beside) > 1:
        names = ", ".join(sorted(each.name.replace(MANIFEST, "json") for each in beside))
        raise FileNotFoundError(f"the folder has several runs: give one of {names}")
    manifest: Manifest = json.loads((file if file.is_file() or not beside else beside[0]).read_text())
    if not isinstance(manifest, dict):
        raise TypeError("it is not a JSON object")
    if is_file_name(str(path)) and Path(manifest["out"]).name != path.name:
        raise FileNotFoundError(f"a later run overwrote it, and wrote {manifest['out']}: only that run can be read")
    return manifest


def folder_of(out: Path) -> Path:
    """Return the folder of a run, whose ``out`` is that folder or a file in it."""
    return out.parent if is_file_name(str(out)) else out


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the nested settings ``values`` by dotted names, such as ``mesh.ring``.

    Items of lists of mappings are named by number, such as ``turns.0.text``.  Each name begins with ``prefix``, which
    includes its dot, such as ``mesh.``.
    """
    by_name: dict[str, object] = {}
    for name, value in values.items():
        children = _children(value)
        by_name |= flat(children, f"{prefix}{name}.") if children else {f"{prefix}{name}": value}
    return by_name


def _children(value: object) -> Mapping[str, object]:
    """Return the children of ``value`` by name, or by number for a list of mappings; empty for a plain value."""
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return {str(number): one for number, one in enumerate(value)}
    return value if isinstance(value, Mapping) else {}


def _read_by(values: Mapping[str, object]) -> Iterator[Path]:
    """Yield the files that a run's settings name: prompts, turns, data, long texts, sensitivity files."""
    data = mapping_at(values, "data")
    for source in [*mappings_at(data, "sources"), *mappings_at(data, "test")]:
        if path := source.get("path"):
            yield from (file.absolute() for file in paths_of(str(path)))
        elif source.get("pydoc"):
            from pydoc_data import topics

            yield Path(topics.__file__)
    prompt, evaluation = mapping_at(values, "prompt"), mapping_at(values, "eval")
    orders = [mapping_at(each, "spd").get("sensitivity") for each in (values, *mappings_at(values, "variants"))]
    text = evaluation.get("text") if evaluation.get("text") != "pydoc" else None
    for name in (values.get("prompts"), values.get("turns"), prompt.get("file"), text, *orders):
        if name:
            yield Path(str(name)).expanduser().absolute()
