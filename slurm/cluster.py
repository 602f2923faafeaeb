"""Queries to Slurm through its own commands: partitions, queueing, cancelling, the state of a job."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.plan import JobPlan


@dataclass(frozen=True)
class Partition:
    """A partition: its number of nodes, and the most cores and the most GPUs of any one node."""

    name: str
    default: bool
    nodes: int
    cpus: int
    gpus: int


def refuse_no_slurm() -> None:
    """Raise ValueError if this machine has no Slurm commands."""
    if not shutil.which("sbatch"):
        raise ValueError(
            "there is no sbatch here: submit from a login node of the cluster; or use launcher=local to run here, "
            "dry_run=true to see the script"
        )


def refuse_unfit_cluster(plan: JobPlan) -> None:
    """Raise ValueError unless one of the job's partitions has enough nodes, cores and GPUs for ``plan``."""
    names = (plan.launcher.partition or "").split(",")
    reasons = [_misfit(_partition_of(name.strip() or None), plan) for name in names]
    if all(reasons):
        raise ValueError(reasons[0])


def _misfit(partition: Partition, plan: JobPlan) -> str:
    """Return why ``partition`` is too small for ``plan``, with what to change; empty if it is not."""
    if plan.settings.nodes > partition.nodes:
        return (
            f"partition {partition.name} is too small for nodes={plan.settings.nodes}: it has {partition.nodes} nodes, "
            "use fewer"
        )
    ranks = plan.ranks_per_node
    for each, available, what, setting in (
        (plan.gpus_per_rank, partition.gpus, "GPU(s)", "gpus_per_rank"),
        (plan.launcher.cpus_per_rank or 1, partition.cpus, "core(s)", "cpus_per_rank"),
    ):
        if ranks * each > available:
            other = f"another launcher.partition, or fewer launcher.{setting}"
            fewer = " and fewer ranks_per_node" if plan.settings.ranks_per_node else ""
            more = f"more nodes{fewer}, or a smaller mesh.tp, whose ranks share a node"
            return (
                f"partition {partition.name} is too small for {ranks} ranks of a node with {each} {what} each: its "
                f"nodes have {available} {what}, use {other if each > available else more}"
            )
    return ""


def _partition_of(name: str | None) -> Partition:
    """Return the partition ``name``, or the cluster's default.  Raises ValueError if it does not exist."""
    existing = partitions()
    for partition in existing:
        if partition.default if name is None else partition.name == name:
            return partition
    missing = "no default partition" if name is None else "no such partition"
    names = ", ".join(partition.name for partition in existing)
    raise ValueError(f"launcher.partition={name or 'null'}: the cluster has {missing}; use one of {names}")


def partitions() -> list[Partition]:
    """Return the cluster's partitions.  Raises ValueError if sinfo fails."""
    by_name: dict[str, Partition] = {}
    # A partition with nodes of several kinds has a line for each kind.
    for line in _run("sinfo", "--noheader", "--format=%P|%D|%c|%G").splitlines():
        marked, nodes, cpus, gres = line.split("|")
        name = marked.rstrip("*")
        earlier = by_name.get(name, Partition(name, marked.endswith("*"), 0, 0, 0))
        by_name[name] = Partition(
            name,
            earlier.default,
            earlier.nodes + int(nodes),
            max(earlier.cpus, int(cpus.rstrip("+"))),
            max(earlier.gpus, _gpus(gres)),
        )
    return list(by_name.values())


def _gpus(gres: str) -> int:
    """Return the number of GPUs in sinfo's ``gpu:h100:8(S:0-1),nvme:1``: 8."""
    resources = [item.partition("(")[0].split(":") for item in gres.split(",") if item.startswith("gpu")]
    return sum(int(fields[-1]) for fields in resources if fields[-1].isdigit())


def refuse_rejected_script(script: Path) -> None:
    """Raise ValueError if sbatch would reject ``script``; queues nothing."""
    _run("sbatch", "--test-only", str(script))


def queue(script: Path) -> int:
    """Queue ``script`` and return the job's number.  Raises ValueError if sbatch rejects it."""
    return int(_run("sbatch", "--parsable", str(script)).split(";")[0])


def cancel(jobs: Sequence[int]) -> None:
    """Cancel ``jobs``, whether they wait or run.  Raises ValueError if scancel fails."""
    _run("scancel", *map(str, jobs))


def is_active(job: int) -> bool:
    """Return True if ``job`` waits or runs.

    Raises ValueError if squeue fails, unless the reason is that Slurm has forgotten a job that ended.
    """
    done = _answer("squeue", "--noheader", f"--jobs={job}")
    # Slurm forgets a job some time after its end, and then calls its number invalid.
    if done.returncode and "invalid job id" not in done.stderr.lower():
        raise ValueError(
            f"squeue cannot say whether job {job} waits or runs ({_errors(done.stderr)}): "
            "submit again when squeue works, or use another folder"
        )
    return bool(done.stdout.strip())


def _run(*command: str) -> str:
    """Return the output of a Slurm command.  Raises ValueError, with its errors, if it fails."""
    done = _answer(*command)
    if done.returncode:
        errors = _errors(done.stderr)
        if command[0] == "sbatch":
            raise ValueError(f"Slurm refuses: {errors}; change the setting that this message names")
        raise ValueError(f"{command[0]} fails: {errors}; submit again when it works")
    return done.stdout


def _answer(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command.  Its output may be no UTF-8 text: squeue cuts a job's name after eight bytes."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _errors(stderr: str) -> str:
    """Return the errors that a Slurm command printed, in one line."""
    return "; ".join(line.partition("error: ")[2] or line for line in stderr.splitlines() if line.strip())
