"""The contents of a job's folder: a copy of the source, each run's settings, and the job script."""

import shutil
from importlib.util import cache_from_source
from pathlib import Path

from omegaconf import OmegaConf

from longctx.text_file import write_text
from recipes.common.provenance import ROOT, commit_of, diff_of, git, is_checkout
from slurm.plan import JobPlan
from slurm.render import script_of

_CODE = (".py", ".yaml", ".sbatch")  # suffixes of untracked files that a run may import or read


def freeze_job(plan: JobPlan, work: Path) -> Path:
    """Write source, settings and script into the job's folder, and return the path of the script.

    The subfolder ``code`` holds the source; each run's folder holds its config.yaml.  Relative paths in settings start
    from ``work``.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    _copy_source(plan.folder / "code")
    for task in plan.tasks:
        task.folder.mkdir(exist_ok=True)
        write_text(task.folder / "config.yaml", OmegaConf.to_yaml(task.config, resolve=True))
        for name in ("failures", "failure.txt"):  # left by an earlier job in the same folder
            (task.folder / name).unlink(missing_ok=True)
    script = plan.folder / "job.sbatch"
    write_text(script, script_of(plan, work, commit_of(ROOT)))
    return script


def _copy_source(code: Path) -> None:
    """Replace ``code`` with the source as it is now, its commit, and its difference from that commit.

    Compiled files go with the source, so that a job's ranks need not compile it again; Python ignores outdated ones.
    """
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir(exist_ok=True)
    write_text(code / "COMMIT", commit_of(ROOT) + "\n")  # first: it says that a job wrote this folder
    for file in _source_files():
        (code / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, code / file, follow_symlinks=False)
        compiled = Path(file).parent / "__pycache__" / Path(cache_from_source(file)).name
        if file.endswith(".py") and (ROOT / compiled).is_file():
            (code / compiled).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / compiled, code / compiled)
    write_text(code / "dirty.diff", diff_of(ROOT))


def _source_files() -> list[str]:
    """Return the relative paths of all tracked files, and of untracked source files that git does not ignore.

    Deleted files are left out, and so are untracked files in the folder of a job.  Without git, or for an installed
    copy, return those of all source files of the packages.
    """
    tracked, untracked = _git_files("--cached"), _git_files("--others", "--exclude-standard")
    if not tracked:  # an installed copy, without git
        return [str(path.relative_to(ROOT)) for top in ("longctx", "recipes", "slurm", "eval", "configs")
                for path in (ROOT / top).rglob("*") if path.suffix in _CODE or path.is_symlink()]  # fmt: skip
    existing = [name for name in tracked if (ROOT / name).is_file() or (ROOT / name).is_symlink()]
    return existing + [name for name in untracked if name.endswith(_CODE) and not _is_in_job(name)]


def _is_in_job(name: str) -> bool:
    """Return True if the untracked file ``name`` is in the folder of a job: an earlier copy of the source."""
    return any((ROOT / folder / "job.sbatch").is_file() for folder in Path(name).parents if folder != Path("slurm"))


def _git_files(*options: str) -> list[str]:
    """Return the paths that ``git ls-files`` lists; none for an installed copy, even inside a checkout."""
    if not is_checkout(ROOT):
        return []
    return [name for name in git(ROOT, "ls-files", "-z", *options, errors="surrogateescape").split("\0") if name]
