"""What a figure was measured on, and with which source: it means nothing without."""

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, str]:
    """Command, commit, processor, cores and versions of this run."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit_of(ROOT),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def hardware() -> dict[str, Any]:
    """The machine that a run's first rank is on, and its job where Slurm started it."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    slurm = {name.removeprefix("SLURM_").lower(): os.environ[name] for name in _OF_A_JOB if name in os.environ}
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "slurm": slurm,
    }


_OF_A_JOB = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION")


def commit_of(source: Path) -> str:
    """The commit of the source; a frozen copy has it in a file.

    ``-dirty`` and a digest of what has been changed, if it has been since.
    """
    if (source / "COMMIT").is_file():
        return (source / "COMMIT").read_text().strip()
    named = _git(source, "describe", "--always", "--dirty", "--abbrev=12").strip() or "not a git checkout"
    return f"{named}-{hashlib.sha256(diff_of(source).encode()).hexdigest()[:8]}" if named.endswith("-dirty") else named


def diff_of(source: Path) -> str:
    """What has been changed of the source since its commit, as a patch; and files that git does not know, by name."""
    if (source / "COMMIT").is_file():
        return (source / "dirty.diff").read_text()
    new = _git(source, "ls-files", "--others", "--exclude-standard")
    return _git(source, "diff", "HEAD") + "".join(f"# not in git: {name}\n" for name in new.splitlines())


def _git(source: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(named)) or platform.processor() or platform.machine()
