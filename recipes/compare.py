"""Compare runs: the settings in which they differ, and their final figures.

python -m recipes.compare DIR DIR...
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table

from longctx.train.track import MANIFEST
from recipes.common.cli import console, is_file_name, reporting
from recipes.common.manifest import flat, folder_of, manifest_of
from recipes.common.renamed import rename_flat

# Names of measured figures, which two runs of one command need not share; ``why`` a strategy was taken cites seconds.
MEASURED = re.compile(
    r"(_s|_per_s|_bytes|_share|ttft_s|mfu|mfu_causal|_per_rank|processor|cores|command|commit|host|why)$"
)
_PROVENANCE = ("commit", "command", "python", "torch", "processor", "cores")
_TRAINING_RECIPES = ("recipes.pretrain", "recipes.extend")
_OUTPUTS = ("out", "session.save", "command")  # the place of the results is not a setting to compare
_MAX_CELL = 60  # characters


def final_figures(run: str) -> dict[str, Any]:
    """Return a run's final figures by name: the last step of training, or all that another recipe wrote.

    Raises ValueError if there is none besides step numbers and measurements of the machine.
    """
    manifest, folder = manifest_of(run), folder_of(Path(run).expanduser())
    names = [Path(manifest["out"]).name] if is_file_name(manifest["out"]) else ["report.json", "metrics.jsonl"]
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])
    try:
        text = file.read_text()
        found = _of_lines(text, manifest["module"]) if file.name == "metrics.jsonl" else flat(json.loads(text))
    except (OSError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{run} has no figures yet: {' and '.join(names)} in {folder} cannot be read") from error
    found = rename_flat({name: value for name, value in found.items() if value is not None})
    if not [name for name in found if name != "step" and not is_measured(name)]:
        names_found = ", ".join(found) or "nothing"
        raise ValueError(f"{run} has no figures to compare: {file} has {names_found}; give a run that has ended")
    return found


def _of_lines(text: str, module: str) -> dict[str, Any]:
    """Return the figures of JSON lines: the last line of training, or all lines by their step."""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    if module in _TRAINING_RECIPES:
        return dict(lines[-1])
    return flat({line.pop("step"): line for line in lines})


def settings_of(run: str) -> dict[str, Any]:
    """Return all settings and inputs of a run by name, without the places that it writes to."""
    manifest = manifest_of(run)
    about = {name: manifest.get(name) for name in _PROVENANCE}
    data: dict[str, str] = {}
    for path, value in manifest["data"].items():  # by name: its folder is not a setting to compare
        name = f"data of {Path(path).name}"
        data[name] = f"{data[name]}, {value}" if name in data else value
    weights = {"weights": ", ".join(manifest.get("weights", {}).values())}
    lines = manifest["diff"].splitlines()
    diff = {"diff": f"{len(lines)} lines, sha256:{sha256(repr(lines).encode()).hexdigest()[:16]}" if lines else ""}
    packages = {f"package {name}": version for name, version in manifest["packages"].items()}
    hardware = {f"machine.{name}": value for name, value in flat(manifest["hardware"]).items()}
    asked = {**rename_flat(flat(manifest["config"])), **about, **weights, **diff, **data, **packages, **hardware}
    return {name: value for name, value in asked.items() if name not in _OUTPUTS}


def differing(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values differ between the mappings ``each``."""
    names = dict.fromkeys(name for values in each for name in values)
    return [name for name in names if any(values.get(name) != each[0].get(name) for values in each)]


def is_measured(name: str) -> bool:
    """Return True for figures of the machine (seconds, bytes), which two runs of one command need not share."""
    return bool(MEASURED.search(name))


def agree(was: Any, now: Any, within: float) -> bool:
    """Return True if two figures are equal, numbers to a relative ``within``."""
    if isinstance(was, int | float) and isinstance(now, int | float):
        return math.isclose(was, now, rel_tol=within, abs_tol=1e-12)
    return bool(was == now)


def table_of(title: str, runs: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    """Return a table with a row per name and a column per run."""
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("", *runs):
        table.add_column(heading, overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *(_shown(value) for value in values))
    return table


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 3] + "..."


def compare(runs: Sequence[str]) -> None:
    """Print the settings in which ``runs`` differ, and their figures.  Raises ValueError for a folder without a run."""
    if len(runs) < 2:
        raise ValueError(f"compare two runs or more: python -m recipes.compare DIR DIR (each with a {MANIFEST})")
    asked, figures = [settings_of(run) for run in runs], [final_figures(run) for run in runs]
    print_table = console.__class__(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160).print
    print_table(table_of("settings that differ", runs, {n: [each.get(n) for each in asked] for n in differing(asked)}))
    every = {name: [each.get(name) for each in figures] for name in dict.fromkeys(n for each in figures for n in each)}
    shown = {
        n: of for n, of in every.items() if n not in _PROVENANCE and not any(isinstance(value, list) for value in of)
    }
    print_table(table_of("final figures", runs, shown))


if __name__ == "__main__":
    reporting(lambda: compare(sys.argv[1:]))
