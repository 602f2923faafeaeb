"""Find the rank that torchrun or srun assigned to this process."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache

from longctx.parallel.launch import Rank

# Environment variables that each launcher sets.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = (
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip

_RESTARTS = "SLURM_RESTART_COUNT"
_SRUN_NUMBERS = ("SLURM_NODEID", "SLURM_STEP_ID", _RESTARTS)  # 0 if not set


def rank_from_environment(environment: Mapping[str, str]) -> Rank | None:
    """Return the rank that torchrun or srun assigned in ``environment``; None without a launcher.

    None also if torchrun or srun started a single process, which may then start local ranks itself.

    RANK and WORLD_SIZE together show that torchrun started this process; SLURM_STEP_NODELIST and SLURM_PROCID together
    show that srun did.  If all four are set, torchrun's are used, since srun may start torchrun.  The exception is
    WORLD_SIZE=1 without TORCHELASTIC_RUN_ID in a step of several tasks: torchrun did not start this process.

    Raises ValueError if a launcher's variables are incomplete, or not numbers where they must be.
    """
    e = environment
    one_task = e.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    one_process = e.get("WORLD_SIZE") == "1"
    if "RANK" in e and "WORLD_SIZE" in e and (one_task or not one_process or "TORCHELASTIC_RUN_ID" in e):
        return None if one_process else _torchrun_rank(e)
    if "SLURM_STEP_NODELIST" in e and "SLURM_PROCID" in e:
        return None if e.get("SLURM_STEP_NUM_TASKS") == "1" else _srun_rank(e)
    if ("RANK" in e or "WORLD_SIZE" in e) and not one_process:
        _refuse_incomplete(e, "torchrun", _TORCHRUN, ())
    return None


def _torchrun_rank(e: Mapping[str, str]) -> Rank:
    """Return the rank that torchrun assigned in the environment ``e``."""
    _refuse_incomplete(e, "torchrun", _TORCHRUN, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    local_rank, local_world_size = int(e.get("LOCAL_RANK", 0)), int(e.get("LOCAL_WORLD_SIZE", 1))
    return Rank(int(e["RANK"]), int(e["WORLD_SIZE"]), local_rank, local_world_size, "env://")


def _srun_rank(e: Mapping[str, str]) -> Rank:
    """Return the rank that srun assigned in the environment ``e``."""
    _refuse_incomplete(e, "srun", _SRUN, (*_SRUN[:4], *_SRUN_NUMBERS))
    host = _first_host(e["SLURM_STEP_NODELIST"])
    port = _port(*(int(e.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", _RESTARTS)))
    local_world_size = _tasks_of_node(e["SLURM_STEP_TASKS_PER_NODE"], int(e.get("SLURM_NODEID", 0)))
    rank, world_size, local_rank = (int(e[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    return Rank(rank, world_size, local_rank, local_world_size, f"tcp://{host}:{port}")


def _refuse_incomplete(
    environment: Mapping[str, str], launcher: str, needed: Sequence[str], numbers: Sequence[str]
) -> None:
    """Raise ValueError if a variable of ``needed`` is not set, or one of ``numbers`` is not a number."""
    present = [name for name in needed if name in environment]
    wrong = [f"{name} is not" for name in needed if name not in environment]
    wrong += [
        f"{name}={environment[name]} is not a number" for name in numbers if not environment.get(name, "0").isdecimal()
    ]
    if wrong:
        raise ValueError(
            f"{launcher}'s variables are incomplete or wrong: {', '.join(present)} set, {wrong[0]}; "
            f"start with {launcher}, or unset {' and '.join(present)} to start local ranks"
        )


def _port(job: int, step: int, restarts: int) -> int:
    """Return the port, from 20000 to 31999, at which rank 0 serves the ranks' addresses.

    It is the same on every rank of a step.  It differs between jobs, unless their numbers are a multiple of 12,000
    apart.  It also differs between steps of a job, which may run at the same time.  After a requeue it is another,
    because a process of the ended run may still hold the old port.  Linux gives outgoing connections ports from 32768
    on.
    """
    return 20000 + (job + 991 * step + 137 * restarts) % 12000


@cache
def current_rank() -> Rank | None:
    """Return `rank_from_environment` of this process's environment, read at the first call.

    Later calls return the same value.  Tests that change the environment call
    ``current_rank.cache_clear()``.
    """
    return rank_from_environment(os.environ)


def _tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Return the tasks of ``node`` of Slurm's run-length encoded list: node 3 of "2(x3),1" has 1."""
    counts: list[int] = []
    for run in tasks_per_node.split(","):
        tasks, _, nodes = run.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[node]


def _first_host(nodes: str) -> str:
    """Return the first name in Slurm's list ``nodes``: a2b07 of "a[2-3,5]b[07-09],c".

    A container may lack Slurm's own ``scontrol show hostnames``.
    """
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes)
    return first.partition(",")[0]


def is_requeued() -> bool:
    """Return True in a Slurm job that was requeued: it has begun its work before."""
    return os.environ.get(_RESTARTS, "0") != "0"
