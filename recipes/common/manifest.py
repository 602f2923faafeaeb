"""What exactly was run: ``manifest.json`` in the folder of a run, enough to run it again and to tell it from others."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from longctx.data.files import paths_of
from longctx.hf.checkpoint import fingerprint
from longctx.parallel.launch import rank_from_environment
from longctx.train.track import MANIFEST
from recipes.common.cli import is_file_name
from recipes.common.provenance import ROOT, diff_of, hardware, provenance

_WHOLE = 2**30  # bytes; of a larger file the size and both ends are hashed
_END = 2**20


def record(config: DictConfig, weights: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
    """Write the manifest of the run that begins now, once however many ranks; nothing for a run without ``out``.

    ``weights`` are the folders of models that it begins with; ``read``, files that it reads besides those that its
    settings name.
    """
    here = rank_from_environment(os.environ)
    if not config.get("out") or (here and here.rank):
        return
    out = Path(config.out).absolute()
    values: Any = OmegaConf.to_container(config, resolve=True)
    about = {
        **provenance(),
        "module": _module(),
        "overrides": list(HydraConfig.get().overrides.task),
        "config": values,
        "diff": diff_of(ROOT),
        "packages": {found.name: found.version for found in sorted(distributions(), key=lambda one: one.name.lower())},
        "weights": {str(folder.absolute()): fingerprint(folder) for folder in sorted(set(weights))},
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
    partial.write_text(json.dumps(about, indent=1) + "\n")
    partial.replace(folder_of(out) / MANIFEST)


def manifest_of(run: str) -> dict[str, Any]:
    """The manifest of the run whose folder, or whose ``out``, ``run`` is.  ValueError if there is none."""
    given = Path(run).expanduser()
    file = folder_of(given) / MANIFEST
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{run} is no run: {file} cannot be read ({error}); give the folder of one") from error
    if is_file_name(run) and Path(found["out"]).name != given.name:
        raise ValueError(f"{run}: the last run in this folder wrote {found['out']}; give every run a folder of its own")
    return found


def folder_of(out: Path) -> Path:
    """The folder of a run whose ``out`` is that folder, or a file in it."""
    return out.parent if is_file_name(str(out)) else out


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names: ``mesh.ring``; those of a list of them by their number, too: ``turns.0.text``."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        inner = _inner(value)
        named |= flat(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return named


def _inner(value: Any) -> Mapping[Any, Any]:
    """What ``value`` has by name, or by number if it is a list of what has names; nothing of any other."""
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def digest(path: Path) -> str:
    """SHA-256 of a file; of a very large one, of its size and both ends, which is said."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        head = file.read(_END)
        file.seek(-_END, os.SEEK_END)
        return f"ends-sha256:{hashlib.sha256(f'{size}'.encode() + head + file.read()).hexdigest()}"


def _read_by(values: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a run's settings name: prompts, turns, those of its sources, long texts, orders of blocks."""
    data = values.get("data") or {}
    for source in [*(data.get("sources") or []), *(data.get("test") or [])]:
        if source.get("path"):
            yield from (path.absolute() for path in paths_of(source["path"]))
        elif source.get("pydoc"):
            from pydoc_data import topics

            yield Path(topics.__file__)
    prompt, asked = values.get("prompt") or {}, values.get("eval") or {}
    orders = [(of.get("spd") or {}).get("sensitivity") for of in (values, *(values.get("variants") or []))]
    text = asked.get("text") if asked.get("text") != "pydoc" else None
    for name in (values.get("prompts"), values.get("turns"), prompt.get("file"), text, *orders):
        if name:
            yield Path(name).expanduser().absolute()


def _module() -> str:
    """The module that was started as ``python -m``."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else ""
    return name if name.startswith(("recipes.", "eval.")) else f"recipes.{HydraConfig.get().job.config_name}"
