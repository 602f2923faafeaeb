"""The job as a script that people can read."""

import shlex
import sys
from pathlib import Path

from slurm.plan import JobPlan
from slurm.settings import NOT_YET

TEMPLATE = Path(__file__).with_name("job.sbatch")


def script_of(plan: JobPlan, work: Path, commit: str) -> str:
    """The text of job.sbatch; ``work`` is the folder that relative paths in the settings begin from."""
    filled = {
        "directives": "\n".join(f"#SBATCH --{option}" for option in directives(plan)),
        "about": f"{plan.name}: {len(plan.tasks)} run(s) of python -m {plan.module}" * plan.is_array
        or f"{plan.name}: python -m {plan.module}",
        "commit": commit,
        "script": shlex.quote(str(plan.run / "job.sbatch")),
        "run": shlex.quote(str(plan.run)),
        "code": shlex.quote(str(plan.run / "code")),
        "settings": _settings(plan),
        "work": shlex.quote(str(work)),
        "setup": "".join(f"{line}\n" for line in plan.launcher.setup),
        "start": _start(plan),
        "output": '2>> "$run/srun.log"' if plan.launcher.how == "slurm" else '> >(tee -a "$run/ranks/0.log") 2>&1',
        "python": shlex.quote(sys.executable),
        "command": " ".join(filter(None, [plan.launcher.container, shlex.quote(sys.executable), "-m", plan.module])),
        "restarts": str(plan.settings.restarts),
        "gate": " | 3" if plan.module == "eval.run" else "",
    }
    text = TEMPLATE.read_text()
    for name, value in filled.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def directives(plan: JobPlan) -> list[str]:
    """The options of sbatch."""
    before = ":".join("JOB" if job == NOT_YET else str(job) for job in plan.settings.jobs_before)
    settings, launcher, each = plan.settings, plan.launcher, plan.ranks_per_node
    log = plan.run / "%a" / "job.log" if plan.is_array else plan.run / "job.log"
    limit = f"%{settings.parallel}" if settings.parallel else ""
    asked = {
        "job-name": plan.name,
        "nodes": settings.nodes,
        "ntasks-per-node": each,
        "cpus-per-task": launcher.cpus_per_rank,
        "gpus-per-node": plan.gpus_per_rank * each or None,
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
    further = [option.removeprefix("--") for option in launcher.sbatch]
    return [f"{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None] + [
        "requeue",
        *further,
    ]


def _settings(plan: JobPlan) -> str:
    alone = () if plan.is_array else plan.tasks[0].words
    lines = ["words=(", *(f"  {shlex.quote(word)}" for word in (*plan.words, *alone)), ")"]
    if plan.is_array:
        lines.append("case ${SLURM_ARRAY_TASK_ID:-} in")
        lines += [f"  {i}) words+=({shlex.join(task.words)}) ;;" for i, task in enumerate(plan.tasks)]
        lines.append('  *) echo "say which run of the sweep: SLURM_ARRAY_TASK_ID=0 bash $0" >&2; exit 2 ;;')
        lines += ["esac", "run=$run/$SLURM_ARRAY_TASK_ID"]
    return "\n".join(lines)


def _start(plan: JobPlan) -> str:
    """srun with a task a rank: nodes in Slurm's order, each one's ranks in a row, so that the first axis is inside."""
    if plan.launcher.how == "local":
        return ""
    cpus = [f"--cpus-per-task={plan.launcher.cpus_per_rank}"] if plan.launcher.cpus_per_rank else []
    options = [f"--nodes={plan.settings.nodes}", f"--ntasks-per-node={plan.ranks_per_node}", *cpus]
    options += ["--distribution=block", "--cpu-bind=none", "--kill-on-bad-exit=1", "--open-mode=append"]
    options += [shlex.quote(option) for option in plan.launcher.srun]
    return f'srun {" ".join(options)} --output="$run/ranks/%t.log" \\\n '
