"""Who failed first, where, and its last words: for a job's failure.txt.

python -m slurm.failure DIR CODE
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

LINES = 30  # of the log of the rank that failed
NOISE = ("Set the environment variable HYDRA_FULL_ERROR", "wandb:")  # behind the last word, or no word at all


@dataclass(frozen=True)
class Ended:
    """How a rank ended that did not end well: when (seconds since 1970), on which host, with which code."""

    rank: int
    at: float
    host: str
    code: int

    def __str__(self) -> str:
        how = f"exited with {self.code}"
        if _is_signal(self.code):
            how = f"was killed by {signal.Signals(self.code - 128).name}"
        return f"rank {self.rank} on {self.host} {how}"


def ends(run: Path) -> list[Ended]:
    """The ranks that left word, the one to blame first: a killed one left no other word, then whoever ended first."""
    found = []
    for file in (run / "ranks").glob("*.end"):
        at, host, code = file.read_text().split()
        found.append(Ended(int(file.stem), float(at), host, int(code)))
    return sorted(found, key=lambda end: (_guilt(end.code), end.at))


def _is_signal(code: int) -> bool:
    """Whether a shell's exit code says killed: 255 is also what a container ends with that could not start."""
    return code - 128 in [*signal.Signals]


def _guilt(code: int) -> int:
    """Killed by something; failed; ended by srun because another had."""
    return 2 if code == 128 + signal.SIGTERM else 0 if _is_signal(code) else 1


def report(run: Path, code: int) -> str:
    """The failure in one place."""
    failed = ends(run)
    said = _last(run / "srun.log", LINES)
    if not failed:
        return f"the job ended with {code}, and no rank left word; Slurm said:\n{said}"
    first, *others = failed
    lines = [
        f"{first}; its last lines, of {run}/ranks/{first.rank}.log:",
        _last(run / "ranks" / f"{first.rank}.log", LINES),
    ]
    lines += [
        f"{end.at - first.at:+.1f} s: {end}: {_last(run / 'ranks' / f'{end.rank}.log', 1).strip()}" for end in others
    ]
    return "\n".join([*lines, f"Slurm said:\n{said}" if said else ""])


def _last(file: Path, count: int) -> str:
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    told = [line for line in lines if line.strip() and not line.startswith(NOISE)]
    return "\n".join(f"  {line}" for line in told[-count:])


if __name__ == "__main__":
    print(report(Path(sys.argv[1]), int(sys.argv[2])))
