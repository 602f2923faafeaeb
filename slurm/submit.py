"""A recipe as a job of a Slurm cluster: the settings of both on one command line.

    python -m slurm.submit recipe=pretrain experiment=pretrain/tiny mesh.ring=4 nodes=2 time=04:00:00
    python -m slurm.submit recipe=pretrain experiment=pretrain/tiny optim.lr=1e-3,3e-4      # a sweep: an array of jobs
    python -m slurm.submit recipe=export checkpoint=outputs/tiny to=outputs/hf after=12
    python -m slurm.submit pipeline=FILE.yaml

What the recipe would refuse is refused before anything is queued.  ``dry_run=true`` prints the script.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from recipes.common.cli import console, reporting
from recipes.common.overrides import CONFIGS
from recipes.common.provenance import ROOT, commit_of
from slurm import cluster
from slurm.freeze import frozen, refuse_unwritable_run
from slurm.plan import JobPlan, forget, planned
from slurm.render import script_of
from slurm.settings import NOT_YET, divided, settings_of

JOB = "job.id"


def main(words: Sequence[str]) -> None:
    """Do what the command line asks; exit code 2, and a line, for what cannot be done."""
    if not words or {"-h", "--help"} & set(words):
        print(__doc__, (CONFIGS / "submit.yaml").read_text(), sep="\n")
        print((CONFIGS / "launcher" / "slurm.yaml").read_text())
        return
    plans = reporting(lambda: plans_of(words))
    if plans[0].settings.dry_run:
        for plan in plans:
            print(script_of(plan, Path.cwd(), commit_of(ROOT)))
        return
    reporting(lambda: submit(plans))


def plans_of(words: Sequence[str]) -> list[JobPlan]:
    """The jobs that ``words`` ask for, checked: one, or those of a pipeline."""
    mine, theirs = divided(words)
    settings, launcher = settings_of(mine)
    if not settings.pipeline:
        return [_checked(planned(settings, launcher, theirs))]
    if theirs:
        raise ValueError(f"{theirs[0]} belongs into a line of pipeline={settings.pipeline}")
    shared = [word for word in mine if not word.startswith("pipeline=")]
    plans: list[JobPlan] = []
    try:
        for line in steps_of(settings.pipeline):
            mine, theirs = divided(line)
            settings, launcher = settings_of([*shared, *mine])
            settings = replace(settings, after=(*settings.jobs_before, NOT_YET)) if plans else settings
            plans.append(_checked(planned(settings, launcher, theirs)))
    except BaseException:
        _forget(plans)
        raise
    return plans


def steps_of(file: str) -> list[list[str]]:
    """The command lines of a pipeline.  ValueError if ``file`` has none."""
    try:
        lines = yaml.safe_load(Path(file).expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"pipeline={file} cannot be read: {error}") from error
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"pipeline={file} is not a list of command lines: - recipe=pretrain experiment=pretrain/tiny ..."
        )
    return [shlex.split(line) for line in lines]


def _checked(plan: JobPlan) -> JobPlan:
    """``plan``, unless the cluster or the job's folder refuses it."""
    if plan.settings.dry_run:
        return plan
    try:
        if plan.launcher.how == "slurm":
            cluster.refuse_no_slurm()
            cluster.refuse_unfit_cluster(plan)
        refuse_unwritable_run(plan.run)
        _refuse_busy(plan.run)
    except ValueError:
        _forget([plan])
        raise
    return plan


def _forget(plans: Sequence[JobPlan]) -> None:
    for plan in plans:
        forget(plan.run, plan.is_new)


def _refuse_busy(run: Path) -> None:
    known = run / JOB
    if known.is_file() and shutil.which("squeue") and cluster.is_active(int(known.read_text())):
        job = known.read_text().strip()
        raise ValueError(f"run={run} belongs to job {job}, which waits or runs: scancel {job}, or give another folder")


def submit(plans: Sequence[JobPlan]) -> list[int]:
    """Freeze and queue ``plans``, each after the one before; say where they are."""
    jobs: list[int] = []
    ran: list[Path] = []
    for plan in plans:
        known = [job for job in plan.settings.jobs_before if job != NOT_YET]
        then = replace(plan, settings=replace(plan.settings, after=(*known, *jobs[-1:])))
        script = frozen(then, Path.cwd())
        if plan.launcher.how == "local":
            _run_here(then, script)
            ran.append(plan.run)
            continue
        jobs.append(_queued(script, jobs, [each for each in plans if each.run not in ran]))
        (plan.run / JOB).write_text(f"{jobs[-1]}\n")
        print(f"job {jobs[-1]}\nrun {plan.run}", flush=True)
        log = plan.tasks[0].folder / "ranks" / "0.log"
        console.print(f"watch  squeue --job {jobs[-1]}; tail -F {plan.tasks[0].folder}/job.log {log}")
        console.print(f"cancel scancel {jobs[-1]}")
    return jobs


def _queued(script: Path, before: Sequence[int], plans: Sequence[JobPlan]) -> int:
    """The job.  ValueError for what Slurm alone refuses: accounts, limits, options.

    Then those ``before`` are cancelled, and nothing is left of ``plans``, which are theirs and those not yet queued.
    """
    try:
        cluster.refuse_refused(script)
        return cluster.queued(script)
    except ValueError:
        if before:
            cluster.cancel(before)
        _forget(plans)
        raise


def _run_here(plan: JobPlan, script: Path) -> None:
    """Every task in turn; the process ends with the first that fails."""
    print(f"run {plan.run}", flush=True)
    for number in range(len(plan.tasks)):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        code = subprocess.run(["bash", str(script)], env=environment, check=False).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
