"""Repeat a run with the command of its manifest, and compare the results.

    python -m recipes.reproduce DIR

The command is started only if it is one of longctx.  A Slurm job's run has a frozen copy of its source in DIR/code,
and that copy runs: reproduce such a run only if you trust its folder.
The new run, and the session that a conversation saves, are written to DIR-again.  A run that is given by its file
x.json writes x-again.json in the same folder, and its session to x-again-session.  A conversation whose turns were
typed or piped in is refused: its manifest does not have them.  The exit code is 1 if the final figures differ.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.parallel.launch import RankFailed
from recipes.common.cli import GATE_FAILED, console, exit_on_error
from recipes.common.manifest import Manifest, folder_of, manifest_file, manifest_of
from recipes.common.overrides import path_word, typed_word
from recipes.common.places import is_file_name
from recipes.common.provenance import ROOT
from recipes.common.settings import mapping_at
from recipes.compare import agree, differing_names, final_figures, is_measured, settings_of, table_of

WITHIN = 1e-6  # relative: another machine sums in a different order
_DECODED = re.compile(r"decode_choices\.\d+$|turns\.\d+\.decode_strategy$")


def run_again(run: str) -> str:
    """Run ``run``, a run's folder or ``out``, again, and return the ``out`` of the new run.

    The new run is written to DIR-again, next to the run's folder DIR, or to x-again.json, next to the ``out`` x.json.
    A failed gate (exit code 3) is no failure.
    Raises ValueError if ``run`` cannot be repeated, and `RankFailed` if the new run fails.
    """
    manifest = manifest_of(run)
    refuse_foreign_command(run, manifest)
    _refuse_typed_turns(run, manifest)
    folder = folder_of(Path(run).expanduser()).resolve()
    if is_file_name(run):
        out = _unused(folder / Path(run).name)
        session = out.with_name(f"{out.stem}-session")
    else:
        beside = _unused(folder)
        out = beside / Path(manifest["out"]).name if is_file_name(manifest["out"]) else beside
        session = beside / "session"
    words = [typed_word(word) for word in manifest["overrides"] if not word.startswith("out=")]
    words += [path_word("out", str(out)), *_session_beside(run, manifest, session), *_decoded(run, manifest)]
    # A Slurm job keeps its code in the run's folder; a sweep keeps it in the folder above.
    source = next((at / "code" for at in (folder, folder.parent) if (at / "code" / "recipes").is_dir()), ROOT)
    if os.pathsep in str(source):
        raise ValueError(
            f"{run}: Python reads {os.pathsep} as the end of a folder's name, and would run other code than that in "
            f"{source}: rename the folder"
        )
    command = [sys.executable, "-m", manifest["module"], *words]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
    cwd = manifest["folder"] if Path(manifest["folder"]).is_dir() else None
    code = subprocess.run(command, env=environment, cwd=cwd, check=False, stdin=subprocess.DEVNULL).returncode
    if code not in (0, GATE_FAILED):
        raise RankFailed(0, 1, f"ended with {code}, in {out}", "")
    return str(out)


def refuse_foreign_command(run: str, manifest: Manifest) -> None:
    """Raise ValueError unless the manifest's command is one of longctx, with settings of the recipe only.

    An option (``--config-dir``) or a setting of Hydra (``hydra.callbacks``) could start other code.
    """
    known = re.fullmatch(r"(recipes|eval)(\.[a-z_]+)+", manifest["module"])
    foreign = [word for word in manifest["overrides"] if re.match(r"\s*([-\"']|[+~]*hydra\b)", word)]
    if not known or foreign:
        raise ValueError(
            f"{run}: its manifest starts {[manifest['module'], *foreign][-1]!r}, which is not a command of longctx: "
            "reproduce runs that longctx made"
        )


def _refuse_typed_turns(run: str, manifest: Manifest) -> None:
    """Raise ValueError if ``run`` is a conversation whose turns came from a terminal or a pipe."""
    if manifest["module"] == "recipes.chat" and not manifest["config"].get("turns"):
        raise ValueError(
            f"{run}: its turns were typed or piped in, and its manifest does not have them: give runs that are to be "
            "reproduced their turns with turns=FILE.jsonl"
        )


def _session_beside(run: str, manifest: Manifest, new: Path) -> list[str]:
    """Return the setting that saves a conversation's session to the folder ``new``, if the run saved one.

    Raises ValueError if the run overwrote the session that it resumed.
    """
    session = mapping_at(manifest["config"], "session")
    if not session.get("save"):
        return []
    load, save = (
        Path(manifest["folder"], Path(str(session[name] or "")).expanduser()).resolve() for name in ("load", "save")
    )
    if session["load"] and load == save:
        raise ValueError(
            f"{run} saved its session over the one that it resumed, session.load={session['load']}, which "
            "is lost: give runs that are to be reproduced another session.save"
        )
    return [path_word("session.save", str(new))]


def _decoded(run: str, manifest: Manifest) -> list[str]:
    """Return the setting that decodes as ``run`` did.

    ``context.decode=auto`` may choose another way on another day, and the default of a version another one.  The list
    is empty for a recipe without this setting, and for a run that decoded in several ways.
    """
    decode = mapping_at(manifest["config"], "context").get("decode")
    if decode == "auto":
        # recipes.generate writes (strategy, reason) by number of sequences, recipes.chat the strategy of each turn.
        figures = {name: value for name, value in final_figures(run).items() if _DECODED.search(name)}
        used = {str(value[0] if isinstance(value, list) else value) for value in figures.values()}
        decode = used.pop() if len(used) == 1 else None
    return [f"context.decode={decode}"] if decode else []


def _unused(out: Path) -> Path:
    """Return a path beside the run's folder or file ``out`` at which there is no run."""
    suffix = out.suffix if is_file_name(out.name) else ""
    name, number = f"{out.name.removesuffix(suffix)}-again", 1
    new = out.with_name(f"{name}{suffix}")
    while new.exists() or manifest_file(new).exists():
        number += 1
        new = out.with_name(f"{name}-{number}{suffix}")
    return new


def reproduce(runs: Sequence[str]) -> None:
    """Run each of ``runs`` again and compare; exit with code 1 if the results of any of them differ."""
    if not runs:
        raise ValueError("no run is given: use python -m recipes.reproduce DIR")
    same = [_reproduce(run) for run in runs]
    if not all(same):
        sys.exit(1)


def _reproduce(run: str) -> bool:
    was = final_figures(run)  # raises for a run without figures before it is run again
    new = run_again(run)
    now = final_figures(new)
    before, after = settings_of(run), settings_of(new)
    if changed := differing_names([before, after]):
        console.print(f"changed since: {', '.join(changed)}")
    # Results also contain settings.  A setting that the run's version did not have is none of its figures.
    names = [name for name in {**was, **now} if not is_measured(name) and (name in before or name not in after)]
    differ = [name for name in names if not agree(was.get(name), now.get(name), WITHIN)]
    shown = differ or [name for name in names if not isinstance(was.get(name), list)]
    table_rows = {name: [was.get(name), now.get(name)] for name in shown}
    console.print(table_of("figures that differ" if differ else "the same figures", [run, str(new)], table_rows))
    console.print(f"{run}: {len(names) - len(differ)} of {len(names)} final figures are the same, to {WITHIN:g}")
    return not differ


if __name__ == "__main__":
    exit_on_error(lambda: reproduce(sys.argv[1:]))
