"""The job script: job.sbatch with the values of a plan."""

import re
import shlex
import sys
from pathlib import Path

from slurm.plan import JobPlan
from slurm.settings import NOT_QUEUED

TEMPLATE = Path(__file__).with_name("job.sbatch")


def script_of(plan: JobPlan, work: Path, commit: str) -> str:
    """Return the text of the job script, with the source's ``commit`` in a comment.

    Relative paths in settings start from the folder ``work``.
    """
    runs = f"{len(plan.tasks)} run(s) of " if plan.is_array else ""
    python = shlex.quote(sys.executable)
    # The request to stop reaches tee, too, which must go on to write what the ranks print.
    local_output = '> >(trap "" USR1 TERM INT; exec tee -a "$run/ranks/0.log") 2>&1'
    values = {
        "directives": "\n".join(f"#SBATCH --{option}" for option in sbatch_options(plan)),
        "about": f"{plan.name}: {runs}python -m {plan.module}",
        "commit": commit,
        "script": shlex.quote(str(plan.folder / "job.sbatch")),
        "run": shlex.quote(str(plan.folder)),
        "code": shlex.quote(str(plan.folder / "code")),
        "settings": _settings_lines(plan),
        "work": shlex.quote(str(work)),
        "setup": "".join(f"{line}\n" for line in plan.launcher.setup),
        "start": _srun_command(plan) if plan.launcher.how == "slurm" else "",
        "output": '2>> "$run/srun.log"' if plan.launcher.how == "slurm" else local_output,
        "python": python,
        "command": " ".join(filter(None, [plan.launcher.container, python, "-m", plan.module])),
        "ranks": f"{plan.settings.nodes} node(s) with {plan.ranks_per_node} rank(s) each",
        "restarts": str(plan.settings.restarts),
        "gate": " | 3" if plan.module in ("eval.run", "recipes.spd_adapt") else "",
    }
    # One pass: a placeholder inside a value is the user's text.
    return re.sub(r"\{([a-z]+)\}", lambda placeholder: values[placeholder[1]], TEMPLATE.read_text())


def sbatch_options(plan: JobPlan) -> list[str]:
    """Return the options of sbatch as ``name=value``, quoted for the shell; JOB is the id of a job not queued yet."""
    before = ":".join("JOB" if job == NOT_QUEUED else str(job) for job in plan.settings.jobs_before)
    settings, launcher, ranks = plan.settings, plan.launcher, plan.ranks_per_node
    folder = str(plan.folder).replace("%", "%%")  # in names of logs Slurm replaces %a, %j and others
    log = f"{folder}/%a/job.log" if plan.is_array else f"{folder}/job.log"
    limit = f"%{settings.parallel}" if settings.parallel else ""
    options = {
        "job-name": plan.name,
        "nodes": settings.nodes,
        "ntasks-per-node": ranks,
        "cpus-per-task": launcher.cpus_per_rank,
        "gpus-per-node": plan.gpus_per_rank * ranks or None,
        "mem": launcher.memory,
        "time": settings.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "array": f"0-{len(plan.tasks) - 1}{limit}" if plan.is_array else None,
        "dependency": f"afterok:{before}" if before else None,
        "kill-on-invalid-dep": "yes" if before else None,
        "signal": f"B:USR1@{settings.warning_s}",
        "open-mode": "append",
        "output": log,
    }
    given = [f"{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*given, "requeue", *(_quote_value(option.removeprefix("--")) for option in launcher.sbatch)]


def _quote_value(option: str) -> str:
    """Return ``name=value`` with its value quoted for sbatch; a value that is in quotes is returned as it is."""
    name, equals, value = option.partition("=")
    return option if re.fullmatch(r"'[^']*'|\"[^\"]*\"", value) else f"{name}{equals}{value and shlex.quote(value)}"


def _settings_lines(plan: JobPlan) -> str:
    """Return shell lines that put the recipe's settings into the array ``words``, and a task's folder into ``run``."""
    only_run = () if plan.is_array else plan.tasks[0].words
    lines = ["words=(", *(f"  {shlex.quote(word)}" for word in (*plan.words, *only_run)), ")"]
    if plan.is_array:
        lines.append("case ${SLURM_ARRAY_TASK_ID:-} in")
        lines += [f"  {i}) words+=({shlex.join(task.words)}) ;;" for i, task in enumerate(plan.tasks)]
        lines.append('  *) echo "set the run of the sweep: SLURM_ARRAY_TASK_ID=0 bash $0" >&2; exit 2 ;;')
        lines += ["esac", "run=$run/$SLURM_ARRAY_TASK_ID"]
    return "\n".join(lines)


def _srun_command(plan: JobPlan) -> str:
    """Return the srun command, with one task per rank.

    Ranks are numbered node by node, in Slurm's order of nodes, so that ranks next to each other on the mesh's first
    axis share a node.
    """
    cpus = [f"--cpus-per-task={plan.launcher.cpus_per_rank}"] if plan.launcher.cpus_per_rank else []
    options = [f"--nodes={plan.settings.nodes}", f"--ntasks-per-node={plan.ranks_per_node}", *cpus]
    options += ["--distribution=block", "--cpu-bind=none", "--kill-on-bad-exit=1", "--open-mode=append"]
    options += [shlex.quote(option) for option in plan.launcher.srun]
    return f'srun {" ".join(options)} --output="${{run//%/%%}}/ranks/%t.log" \\\n '
