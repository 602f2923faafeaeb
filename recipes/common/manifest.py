"""``manifest.json`` in a run's folder: what is needed to run it again and to compare it with other runs."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from longctx.data.files import paths_of
from longctx.data.identity import digest
from longctx.hf.checkpoint import fingerprint
from longctx.parallel.launch import current_rank
from longctx.train.track import MANIFEST
from recipes.common.cli import is_file_name
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


def record(config: DictConfig, weights: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
    """Write the manifest of the run that begins now, on the first rank; a run without ``out`` gets none.

    ``weights`` are the folders of the models that the run starts from.  ``read`` are files that it reads although no
    setting names them.
    """
    rank = current_rank()
    if not config.get("out") or (rank and rank.rank):
        return
    out = Path(config.out).absolute()
    values = as_dict(config)
    cache = mapping_at(values, "model").get("cache")
    manifest = {
        **provenance(),
        "module": _module(),
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
    partial = folder_of(out) / f"{MANIFEST}.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(folder_of(out) / MANIFEST)


def manifest_of(run: str) -> Manifest:
    """Return the manifest of a run, given its folder or its ``out``.  Raises ValueError if there is none."""
    path = Path(run).expanduser()
    file = folder_of(path) / MANIFEST
    try:
        manifest: Manifest = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{run} is not a run: {file} cannot be read ({error}); give a run's folder") from error
    if is_file_name(run) and Path(manifest["out"]).name != path.name:
        raise ValueError(f"{run}: the last run in this folder wrote {manifest['out']}; give each run another folder")
    return manifest


def folder_of(out: Path) -> Path:
    """Return the folder of a run, whose ``out`` is that folder or a file in it."""
    return out.parent if is_file_name(str(out)) else out


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted names: ``mesh.ring``; items of lists of mappings by number: ``turns.0.text``."""
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


def _module() -> str:
    """Return the module that ``python -m`` started."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else ""
    return name if name.startswith(("recipes.", "eval.")) else f"recipes.{HydraConfig.get().job.config_name}"
