"""The report of a failed job: the rank that failed first, its host and its last log lines.

python -m slurm.failure DIR CODE
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

LINES = 30  # log lines to show of the rank that failed first
NOISE = ("Set the environment variable HYDRA_FULL_ERROR", "wandb:")  # lines that often follow the actual error


@dataclass(frozen=True)
class RankExit:
    """A rank that failed: time ``at`` in seconds since 1970, ``host``, and the shell's exit ``code``."""

    rank: int
    at: float
    host: str
    code: int

    def __str__(self) -> str:
        cause = f"exited with {self.code}"
        if _is_signal(self.code):
            cause = f"was killed by {signal.Signals(self.code - 128).name}"
        return f"rank {self.rank} on {self.host} {cause}"


def read_exits(run: Path) -> list[RankExit]:
    """Return the failed ranks that left a file ``ranks/N.end`` in ``run``, the likely cause of the failure first.

    Killed ranks come first, then failed ranks, then those that SIGTERM ended; within each, earlier exits come first.
    """
    exits = []
    for file in (run / "ranks").glob("*.end"):
        words = file.read_text().split()
        if len(words) == 3:  # none on a full disk
            exits.append(RankExit(int(file.stem), float(words[0]), words[1], int(words[2])))
    return sorted(exits, key=lambda exit_: (_blame_order(exit_.code), exit_.at))


def _is_signal(code: int) -> bool:
    """Return True if a shell's exit code means killed by a signal; 255 (a container cannot start) does not."""
    return code - 128 in [*signal.Signals]


def _blame_order(code: int) -> int:
    """Return 0 for a killed rank, 1 for a failed one, 2 for SIGTERM, which srun sends to the others after a failure."""
    return 2 if code == 128 + signal.SIGTERM else 0 if _is_signal(code) else 1


def report(run: Path, code: int) -> str:
    """Return the text of failure.txt for a job in folder ``run`` that exited with ``code``."""
    exits = read_exits(run)
    slurm_output = _last_lines(run / "srun.log", LINES)
    if not exits:
        return f"the job exited with {code}, and no rank recorded how it failed; Slurm's output:\n{slurm_output}"
    first, *others = exits
    lines = [
        f"{first}; last lines of {run}/ranks/{first.rank}.log:",
        _last_lines(run / "ranks" / f"{first.rank}.log", LINES),
    ]
    for other in others:
        last_line = _last_lines(run / "ranks" / f"{other.rank}.log", 1).strip()
        lines.append(f"{other.at - first.at:+.1f} s: {other}: {last_line}")
    return "\n".join([*lines, f"Slurm's output:\n{slurm_output}" if slurm_output else ""])


def _last_lines(file: Path, count: int) -> str:
    """Return the last ``count`` lines of ``file``, indented, without empty lines and `NOISE`; empty without a file."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    shown = [line for line in lines if line.strip() and not line.startswith(NOISE)]
    return "\n".join(f"  {line}" for line in shown[-count:])


if __name__ == "__main__":
    print(report(Path(sys.argv[1]), int(sys.argv[2])))
