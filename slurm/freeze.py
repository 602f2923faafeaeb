"""A run's folder as the job finds it: the code as it is now, and what it will be run with."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

from recipes.common.provenance import ROOT, commit_of, diff_of
from slurm.plan import JobPlan
from slurm.render import script_of

_CODE = (".py", ".yaml", ".sbatch")  # of what git does not know yet, what a run may import or read


def refuse_unwritable_run(run: Path) -> None:
    """ValueError unless the job's folder can be written; it is made."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise ValueError(f"run={run} cannot be written ({error.strerror}): give a folder of yours") from error


def frozen(plan: JobPlan, work: Path) -> Path:
    """The job's script, in its folder; beside it ``code``, and for each run its ``config.yaml``."""
    code = plan.run / "code"
    shutil.rmtree(code, ignore_errors=True)
    for file in _files():
        (code / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, code / file, follow_symlinks=False)
    (code / "COMMIT").write_text(commit_of(ROOT) + "\n")
    (code / "dirty.diff").write_text(diff_of(ROOT))
    for task in plan.tasks:
        task.folder.mkdir(exist_ok=True)
        OmegaConf.save(task.config, task.folder / "config.yaml", resolve=True)
        for left in ("failures", "failure.txt"):
            (task.folder / left).unlink(missing_ok=True)
    script = plan.run / "job.sbatch"
    script.write_text(script_of(plan, work, commit_of(ROOT)))
    return script


def _files() -> list[str]:
    """The source: all that git has, and what it would have if it were told."""
    known, new = _listed("--cached"), _listed("--others", "--exclude-standard")
    if not known:  # not a checkout
        return [str(path.relative_to(ROOT)) for top in ("longctx", "recipes", "slurm", "eval", "configs")
                for path in (ROOT / top).rglob("*") if path.suffix in _CODE]  # fmt: skip
    return [name for name in known if (ROOT / name).is_file()] + [name for name in new if name.endswith(_CODE)]


def _listed(*which: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *which], capture_output=True, text=True, check=False
    )
    return [name for name in done.stdout.split("\0") if name]
