"""What Slurm is asked, by its own commands."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.plan import JobPlan


@dataclass(frozen=True)
class Partition:
    """What a partition has: nodes, and of the best of them cores and GPUs."""

    name: str
    default: bool
    nodes: int
    cpus: int
    gpus: int


def refuse_no_slurm() -> None:
    """ValueError where there is no Slurm to ask."""
    if not shutil.which("sbatch"):
        raise ValueError(
            "there is no sbatch here: submit from a login node of the cluster; or use launcher=local to run here, "
            "dry_run=true to see the script"
        )


def refuse_unfit_cluster(plan: JobPlan) -> None:
    """ValueError unless the cluster has such a partition, with that many nodes, cores and GPUs."""
    there = partitions()
    asked = plan.launcher.partition
    fitting = [each for each in there if each.name == asked or (asked is None and each.default)]
    if not fitting:
        names = ", ".join(each.name for each in there)
        raise ValueError(f"launcher.partition={asked} is not of this cluster: use one of {names}")
    (partition,) = fitting
    ranks, cpus = plan.ranks_per_node, plan.launcher.cpus_per_rank or 1
    for wanted, have, what in (
        (plan.settings.nodes, partition.nodes, f"nodes={plan.settings.nodes}: it has {{}} nodes, use fewer"),
        (ranks * plan.gpus_per_rank, partition.gpus, f"{ranks} ranks of a node with {plan.gpus_per_rank} GPU(s) each: "
         "its nodes have {} GPUs, use more nodes"),
        (ranks * cpus, partition.cpus, f"{ranks} ranks of a node with {cpus} core(s) each: its nodes have {{}} cores, "
         "use more nodes"),
    ):  # fmt: skip
        if wanted > have:
            raise ValueError(f"partition {partition.name} is too small for {what.format(have)}")


def partitions() -> list[Partition]:
    """The cluster's partitions.  ValueError if it does not answer."""
    found: dict[str, Partition] = {}
    for line in _asked("sinfo", "--noheader", "--format=%P|%D|%c|%G").splitlines():
        name, nodes, cpus, gres = line.split("|")
        plain, before = name.rstrip("*"), found.get(name.rstrip("*"))
        found[plain] = Partition(
            plain,
            name.endswith("*"),
            int(nodes) + (before.nodes if before else 0),
            max(int(cpus.rstrip("+")), before.cpus if before else 0),
            max(_gpus(gres), before.gpus if before else 0),
        )
    return list(found.values())


def _gpus(gres: str) -> int:
    """The GPUs of sinfo's ``gpu:h100:8(S:0-1),nvme:1``."""
    each = [part.partition("(")[0].split(":") for part in gres.split(",") if part.startswith("gpu")]
    return sum(int(words[-1]) for words in each if words[-1].isdigit())


def refuse_refused(script: Path) -> None:
    """ValueError if sbatch would refuse the script; nothing is queued."""
    _asked("sbatch", "--test-only", str(script))


def queued(script: Path) -> int:
    """The job that ``script`` now is."""
    return int(_asked("sbatch", "--parsable", str(script)).split(";")[0])


def cancel(jobs: Sequence[int]) -> None:
    """End ``jobs``, or keep them from beginning."""
    _asked("scancel", *map(str, jobs))


def is_active(job: int) -> bool:
    """Whether the job waits or runs.  ValueError if Slurm does not tell."""
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False)
    if done.returncode and "invalid job id" not in done.stderr.lower():  # what it says of those that ended long ago
        raise ValueError(
            f"squeue does not tell whether job {job} waits or runs ({_errors(done.stderr)}): "
            "submit again when it does, or give another folder"
        )
    return bool(done.stdout.strip())


def _asked(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"Slurm refuses: {_errors(done.stderr)}")
    return done.stdout


def _errors(stderr: str) -> str:
    """What a command of Slurm complains of, in a line."""
    return "; ".join(line.partition("error: ")[2] or line for line in stderr.splitlines() if line.strip())
