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

from rich.table import Table

from longctx.hf.checkpoint import same_model
from longctx.train.track import MANIFEST
from recipes.common.cli import exit_on_error, plain_console
from recipes.common.manifest import flat, folder_of, manifest_of
from recipes.common.places import is_file_name
from recipes.common.renamed import rename_flat

# Names of figures that depend on the machine or its software; ``why``, the reason for a strategy, cites seconds.
# ``max_logit_diff`` is rounding, whose size differs between machines and versions.  The way to decode, which
# ``context.decode=auto`` chooses by measured rates, changes bytes and rounding only.
MEASURED = re.compile(
    r"(_s|_per_s|_bytes|_share|ttft_s|mfu|mfu_causal|_per_rank|(?<![a-z])(processor|cores|command|commit|host|why)|"
    r"max_logit_diff|decode_strategy|decode_choices\.\d+|context\.decode|bytes_sent|\bpython|\btorch)$"
)
_PROVENANCE = ("commit", "command", "python", "torch", "processor", "cores")
_TRAINING_RECIPES = ("recipes.pretrain", "recipes.extend", "recipes.finetune")
_OUTPUTS = ("out", "session.save", "command")  # places that the results are written to are not compared
_MAX_CELL = 60  # characters


def final_figures(run: str) -> dict[str, object]:
    """Return a run's final figures by name: those of the last step for a training run, all for any other recipe.

    ``run`` is the run's folder or its ``out``.  Raises ValueError if the run has no figures, or only step numbers and
    measurements of the machine.
    """
    manifest, folder = manifest_of(run), folder_of(Path(run).expanduser())
    names = [Path(manifest["out"]).name] if is_file_name(manifest["out"]) else ["report.json", "metrics.jsonl"]
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])
    try:
        text = file.read_text()
        figures = (
            _figures_of_lines(text, manifest["module"]) if file.name == "metrics.jsonl" else flat(json.loads(text))
        )
    except (OSError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{run} has no figures yet: {' and '.join(names)} in {folder} cannot be read; give a run that has ended"
        ) from error
    figures = rename_flat({name: value for name, value in figures.items() if value is not None})
    if not [name for name in figures if name != "step" and not is_measured(name)]:
        written = ", ".join(figures) or "nothing"
        raise ValueError(f"{run} has no figures to compare: {file} has {written}; give a run that has ended")
    return figures


def _figures_of_lines(text: str, module: str) -> dict[str, object]:
    """Return the figures by name in ``text``, the JSON lines of a run of recipe ``module``.

    For a training run these are the last line's figures; for other runs those of all lines, with the step before the
    name.
    """
    lines: list[dict[str, object]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    if module in _TRAINING_RECIPES:
        return lines[-1]
    return flat({str(line.pop("step")): line for line in lines})


def settings_of(run: str) -> dict[str, object]:
    """Return the settings, inputs, software versions and hardware of a run by name, without its output paths.

    ``run`` is the run's folder or its ``out``.
    """
    manifest = manifest_of(run)
    versions = {name: manifest.get(name) for name in _PROVENANCE}
    data: dict[str, str] = {}
    for path, value in manifest["data"].items():  # by file name: the folder is not compared
        name = f"data of {Path(path).name}"
        data[name] = f"{data[name]}, {value}" if name in data else value
    weights = {"weights": ", ".join(manifest.get("weights", {}).values())}
    lines = manifest["diff"].splitlines()
    diff = {"diff": f"{len(lines)} lines, sha256:{sha256(repr(lines).encode()).hexdigest()[:16]}" if lines else ""}
    packages = {f"package {name}": version for name, version in manifest["packages"].items()}
    hardware = {f"machine.{name}": value for name, value in flat(manifest["hardware"]).items()}
    settings = {**rename_flat(flat(manifest["config"])), **versions, **weights, **diff, **data, **packages, **hardware}
    return {name: value for name, value in settings.items() if name not in _OUTPUTS}


def differing_names(runs: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names whose values differ between ``runs``, in order of first appearance.

    A missing name counts as None.  Fingerprints of the same model count as equal (`same_model`).
    """
    names = dict.fromkeys(name for values in runs for name in values)
    return [name for name in names if not all(same_model(values.get(name), runs[0].get(name)) for values in runs)]


def is_measured(name: str) -> bool:
    """Return True for figures that depend on the machine or the command; two runs need not share them.

    Examples are times, rates, memory, the commit and the version of torch.
    """
    return bool(MEASURED.search(name))


def agree(was: object, now: object, within: float) -> bool:
    """Return True if ``was`` equals ``now``; numbers may differ by ``within``, relative to the larger of the two."""
    if isinstance(was, int | float) and isinstance(now, int | float):
        return math.isclose(was, now, rel_tol=within, abs_tol=1e-12)
    return was == now


def table_of(title: str, runs: Sequence[str], table_rows: Mapping[str, Sequence[object]]) -> Table:
    """Return a table called ``title`` with a row for each name in ``table_rows`` and a column for each of ``runs``."""
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("", *runs):
        table.add_column(heading, overflow="fold")
    for name, values in table_rows.items():
        table.add_row(name, *(_shown(value) for value in values))
    return table


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 3] + "..."


def compare(runs: Sequence[str]) -> None:
    """Print the settings in which ``runs``, folders or ``out`` files, differ, and their final figures.

    Raises ValueError for fewer than two runs, for a folder without a run, and for a run without figures.
    """
    if len(runs) < 2:
        raise ValueError(
            f"fewer than two runs to compare: use python -m recipes.compare DIR DIR (each with a {MANIFEST})"
        )
    settings, figures = [settings_of(run) for run in runs], [final_figures(run) for run in runs]
    print_table = plain_console(stderr=False, width=160).print
    differing = {name: [each.get(name) for each in settings] for name in differing_names(settings)}
    print_table(table_of("settings that differ", runs, differing))
    names = [name for name in dict.fromkeys(name for each in figures for name in each) if name not in _PROVENANCE]
    values = {name: [each.get(name) for each in figures] for name in names}
    shown = {name: row for name, row in values.items() if not any(isinstance(value, list) for value in row)}
    print_table(table_of("final figures", runs, shown))


if __name__ == "__main__":
    exit_on_error(lambda: compare(sys.argv[1:]))
