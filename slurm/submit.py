"""Submit a recipe to a Slurm cluster; the settings of both are on one command line.

    python -m slurm.submit recipe=pretrain experiment=pretrain/tiny mesh.ring=4 nodes=2 time=04:00:00
    python -m slurm.submit pipeline=FILE.yaml

Settings that the recipe refuses are refused before anything is queued.  Exit codes: 0 queued; 2 refused.  Standard
output has a line ``job NUMBER`` and a line ``run FOLDER`` for each job.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import yaml

from longctx.text_file import write_text
from recipes.common.cli import console, exit_on_error
from recipes.common.help import help_of
from recipes.common.lock import hold
from recipes.common.places import is_file_name
from recipes.common.provenance import ROOT, commit_of
from recipes.common.startup import loaded, print_page
from slurm import cluster
from slurm.freeze import freeze_job
from slurm.plan import JobPlan, plan_job
from slurm.render import script_of
from slurm.settings import NOT_QUEUED, Launcher, SubmitSettings, read_settings, split_words

# Lock file in the job's folder: held until all jobs are queued, and by a job with launcher=local until its end.
LOCK = ".submit.lock"
JOB = "job.id"  # file in the job's folder with the number of its last job


def main(words: Sequence[str]) -> None:
    """Check and queue what the command line asks for; with ``dry_run=true`` print the scripts instead.

    Without ``words``, or with --help, print the help text.
    """
    loaded()
    if not words or {"-h", "--help"} & set(words):
        print_page(help_of("submit"))
        return
    plans = exit_on_error(lambda: make_plans(words))
    if plans[0].settings.dry_run:
        for plan in plans:
            print(script_of(plan, Path.cwd(), commit_of(ROOT)))
        return
    exit_on_error(lambda: submit(plans))


def make_plans(words: Sequence[str]) -> list[JobPlan]:
    """Return the checked job that ``words`` ask for, or the jobs of a pipeline; writes nothing.

    Raises ValueError for whatever the recipe, the cluster or the job's folder refuses.  With ``dry_run``, the cluster
    and the folder are not checked.
    """
    own, recipe_words = split_words(words)
    settings, launcher = read_settings(own)
    if not settings.pipeline:
        _refuse_waiting_here(settings, launcher, [])
        plans = [plan_job(settings, launcher, recipe_words)]
    elif recipe_words:
        raise ValueError(
            f"{recipe_words[0]} is a recipe's setting: write it in a line of pipeline={settings.pipeline} instead"
        )
    else:
        plans = _pipeline_plans(settings.pipeline, [word for word in own if not word.startswith("pipeline=")])
    for plan in plans:
        if not plan.settings.dry_run:
            _refuse_unready(plan)
    return plans


def _pipeline_plans(file: str, shared: Sequence[str]) -> list[JobPlan]:
    """Return the jobs of the pipeline in ``file``; each waits for the job before it.

    ``shared`` are slurm.submit's settings for all of the jobs.
    """
    plans: list[JobPlan] = []
    for line in read_pipeline(file):
        own, recipe_words = split_words(line)
        if any(word.startswith("dry_run=") for word in own):
            raise ValueError("dry_run is for all jobs of a pipeline: write it on the command line, not in a line")
        settings, launcher = read_settings([*shared, *own])
        _refuse_waiting_here(settings, launcher, plans)
        settings = replace(settings, after=(*settings.jobs_before, NOT_QUEUED)) if plans else settings
        plans.append(plan_job(settings, launcher, recipe_words, [plan.folder for plan in plans]))
    _refuse_shared_out(plans)
    return plans


def _refuse_shared_out(plans: Sequence[JobPlan]) -> None:
    """Raise ValueError if two jobs would write the same file ``out``: the second would replace the first's results."""
    outs = [str(task.config.out) for plan in plans for task in plan.tasks if task.config.get("out")]
    if shared := [out for out in outs if is_file_name(out) and outs.count(out) > 1]:
        raise ValueError(f"two jobs of the pipeline write to out={shared[0]}: give each another out= in its line")


def _refuse_waiting_here(settings: SubmitSettings, launcher: Launcher, before: Sequence[JobPlan]) -> None:
    """Raise ValueError for a job with launcher=local that would wait for a queued job: it would run at once.

    ``before`` are the jobs before it in its pipeline.
    """
    queued = [plan.name for plan in before if plan.launcher.how == "slurm"]
    if launcher.how == "local" and (queued or settings.after):
        awaited = f"the pipeline's job {queued[-1]}, which is queued" if queued else f"after={settings.after}"
        raise ValueError(
            f"a job with launcher=local runs at once, and does not wait for {awaited}: give it the launcher of that "
            "job, or run it when that job has ended"
        )


def read_pipeline(file: str) -> list[list[str]]:
    """Return the words of each command line of a pipeline.

    Raises ValueError if ``file`` is not a YAML list of command lines.
    """
    try:
        lines = yaml.safe_load(Path(file).expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"pipeline={file} cannot be read ({error}): give a YAML list of command lines") from error
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"pipeline={file} is not a YAML list of command lines: write lines such as "
            "- recipe=pretrain experiment=pretrain/tiny"
        )
    return [shlex.split(line) for line in lines]


def _refuse_unready(plan: JobPlan) -> None:
    """Raise ValueError if the cluster is too small for ``plan``, or its folder belongs to a job that waits or runs."""
    if plan.launcher.how == "slurm":
        cluster.refuse_no_slurm()
        cluster.refuse_unfit_cluster(plan)
    _refuse_active_job(plan.folder)


def _refuse_active_job(folder: Path) -> None:
    """Raise ValueError if ``folder`` belongs to a job that waits or runs, or if its job.id is damaged."""
    file = folder / JOB
    if not file.is_file() or not shutil.which("squeue"):
        return
    job = file.read_text().strip()
    if not job.isdecimal():
        raise ValueError(
            f"{file} is damaged, and names no job ({job!r}): check in squeue that none of your jobs uses this folder, "
            "then remove the file"
        )
    if cluster.is_active(int(job)):
        raise ValueError(
            f"folder={folder} belongs to job {job}, which waits or runs: scancel {job}, or use another folder"
        )


def submit(plans: Sequence[JobPlan]) -> list[int]:
    """Freeze and queue ``plans``, each after the one before, and print the jobs' numbers and folders.

    Returns the numbers, and writes each to job.id in its job's folder.  With launcher=local the jobs run here instead,
    and have no numbers; a failure exits with the run's code.

    Raises ValueError if Slurm rejects one of them, for an account, a limit or an option, and if another submission uses
    one of the folders.  Then the jobs queued before are cancelled, and all folders that this call made are deleted.
    """
    jobs: list[int] = []
    begun: list[Path] = []  # folders of queued jobs in which this call wrote the first file
    with ExitStack() as locks:  # released when all jobs are queued: until then, folders may have to be deleted
        for checked in plans:
            # 1. Put the previous job's number in the plan.
            known = [job for job in checked.settings.jobs_before if job != NOT_QUEUED]
            plan = replace(checked, settings=replace(checked.settings, after=(*known, *jobs[-1:])))
            # 2. Write the folder, and run or queue the job.
            if plan.launcher.how == "local":
                with hold(plan.folder / LOCK, f"folder={plan.folder}") as lock:
                    _refuse_active_job(plan.folder)
                    _run_locally(plan, freeze_job(plan, Path.cwd()), lock)
                continue
            _queue(plan, jobs, begun, locks)
            # 3. Print where it is.
            print(f"job {jobs[-1]}\nrun {plan.folder}", flush=True)
            logs = shlex.join(str(plan.tasks[0].folder / name) for name in ("job.log", "ranks/0.log"))
            console.print(f"watch  squeue --job {jobs[-1]}; tail -F {logs}")
            console.print(f"cancel scancel {jobs[-1]}")
    return jobs


def _queue(plan: JobPlan, jobs: list[int], begun: list[Path], locks: ExitStack) -> None:
    """Lock and write the folder of ``plan``, queue its script, and add the job's number to ``jobs``.

    The lock is released by ``locks``.  If nothing else is in the folder, it is added to ``begun``.  If Slurm rejects
    the script, nothing in the folder is changed.  If that happens, or the folder is in use or cannot be written, this
    cancels ``jobs``, empties the folders ``begun``, and raises ValueError.  If jobs cannot be cancelled, their folders
    are left: they may still run.
    """
    before = len(jobs)
    try:
        _lock_folder(plan.folder, locks)
        _refuse_active_job(plan.folder)
        if not _files_in(plan.folder):
            begun.append(plan.folder)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "job.sbatch")
            write_text(script, script_of(plan, Path.cwd(), commit_of(ROOT)))
            cluster.refuse_rejected_script(script)
        jobs.append(cluster.queue(freeze_job(plan, Path.cwd())))
        write_text(plan.folder / JOB, f"{jobs[-1]}\n")
    except (ValueError, OSError) as rejected:
        left = _cancel(jobs)
        for job_folder in begun:
            if not left or (job_folder == plan.folder and len(jobs) == before):
                _empty(job_folder)
        raise ValueError(f"{rejected}{left}") from rejected


def _lock_folder(folder: Path, locks: ExitStack) -> None:
    """Make and lock ``folder``; ``locks`` releases it, and then removes those of the new folders that are empty."""
    while not folder.exists():  # another submission may remove a parent that was empty
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        with suppress(FileExistsError, FileNotFoundError):
            missing[-1].mkdir()
            locks.callback(_remove_if_empty, missing[-1])
    locks.enter_context(hold(folder / LOCK, f"folder={folder}"))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _files_in(folder: Path) -> list[Path]:
    """Return what is in ``folder``, apart from the lock file."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def _empty(folder: Path) -> None:
    """Remove all from ``folder`` but the lock file, without which another submission could write there meanwhile."""
    for path in _files_in(folder) if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _cancel(jobs: Sequence[int]) -> str:
    """Cancel ``jobs``; return an empty text, or if that fails, what to add to a message."""
    try:
        if jobs:
            cluster.cancel(jobs)
    except ValueError as error:
        numbers = " ".join(map(str, jobs))
        return f"; the jobs before it are still queued, as they cannot be cancelled ({error}): use scancel {numbers}"
    return ""


def _run_locally(plan: JobPlan, script: Path, lock: int | None) -> None:
    """Run the tasks one after the other; exit with the code of the first that fails.

    The script inherits the descriptor ``lock``: the folder stays locked if this process is killed and the script not.
    """
    print(f"run {plan.folder}", flush=True)
    for number in range(len(plan.tasks)):
        # Without the variables of an allocation that this runs in: the run is no task of that job.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment["SLURM_ARRAY_TASK_ID"] = str(number)
        inherited = () if lock is None else (lock,)
        code = subprocess.run(["bash", str(script)], env=environment, check=False, pass_fds=inherited).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
