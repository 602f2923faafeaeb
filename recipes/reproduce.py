"""A run once more, as its manifest says, and whether the same comes out.

    python -m recipes.reproduce DIR

The new run is beside it, in DIR-again, as is the session that a conversation saves.  Exit code 1 if its final figures
are others.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.parallel.launch import RankFailed
from recipes.common.cli import GATE_FAILED, console, is_file_name, reporting
from recipes.common.manifest import folder_of, manifest_of
from recipes.common.provenance import ROOT
from recipes.compare import agree, differing, final_figures, is_measured, settings_of, table_of

WITHIN = 1e-6  # relative: another machine sums in another order


def again(run: str) -> str:
    """Run it once more; the ``out`` of the new run.  ValueError for what is no run, `RankFailed` if it fails now."""
    manifest = manifest_of(run)
    folder = folder_of(Path(run).expanduser()).resolve()
    beside = _free(folder)
    out = beside / Path(manifest["out"]).name if is_file_name(manifest["out"]) else beside
    words = [word for word in manifest["overrides"] if not word.startswith("out=")]
    # A job's code is in its run's folder; of a sweep, in the folder of all its runs.
    source = next((at / "code" for at in (folder, folder.parent) if (at / "code" / "recipes").is_dir()), ROOT)
    command = [sys.executable, "-m", manifest["module"], *words, f"out={out}", *_own_session(run, manifest, beside)]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
    where = manifest["folder"] if Path(manifest["folder"]).is_dir() else None
    code = subprocess.run(command, env=environment, cwd=where, check=False).returncode
    if code not in (0, GATE_FAILED):
        raise RankFailed(0, 1, f"ended with {code}, in {beside}", "")
    return str(out)


def _own_session(run: str, manifest: Mapping[str, Any], beside: Path) -> list[str]:
    """The setting that saves a conversation ``beside`` and not over its session; none where none was saved.

    Raises ValueError if the session that it went on from is no more.
    """
    kept = manifest["config"].get("session") or {}
    if not kept.get("save"):
        return []
    load, save = (Path(manifest["folder"], Path(kept[name] or "").expanduser()).resolve() for name in ("load", "save"))
    if kept["load"] and load == save:
        raise ValueError(
            f"{run} saved its session over the one that it went on from, session.load={kept['load']}, which cannot be "
            "gone on from again: give a run that is to be reproduced another session.save"
        )
    return [f"session.save={beside / 'session'}"]


def _free(folder: Path) -> Path:
    number, name = 1, f"{folder.name}-again"
    while (folder.parent / name).exists():
        number += 1
        name = f"{folder.name}-again-{number}"
    return folder.parent / name


def reproduce(runs: Sequence[str]) -> None:
    """Run ``runs`` again, one after the other, and compare; exit code 1 if one does not give the same."""
    if not runs:
        raise ValueError("say which run: python -m recipes.reproduce DIR")
    same = [_reproduced(run) for run in runs]
    if not all(same):
        sys.exit(1)


def _reproduced(run: str) -> bool:
    was = final_figures(run)  # refuses a run without any, before it takes its time again
    new = again(run)
    now = final_figures(new)
    if changed := differing([settings_of(run), settings_of(new)]):
        console.print(f"not as it was: {', '.join(changed)}")
    names = [name for name in {**was, **now} if not is_measured(name)]
    off = [name for name in names if not agree(was.get(name), now.get(name), WITHIN)]
    shown = off or [name for name in names if not isinstance(was.get(name), list)]
    rows = {name: [was.get(name), now.get(name)] for name in shown}
    console.print(table_of("figures that differ" if off else "the same figures", [run, str(new)], rows))
    console.print(f"{run}: {len(names) - len(off)} of {len(names)} final figures are the same, to {WITHIN:g}")
    return not off


if __name__ == "__main__":
    reporting(lambda: reproduce(sys.argv[1:]))
