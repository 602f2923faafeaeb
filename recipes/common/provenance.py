"""Provenance of a figure: command, commit, machine and versions."""

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import longctx

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, str]:
    """Return the command, commit, processor, cores and versions of this run."""
    import torch

    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit_of(ROOT),
        "processor": _processor(),
        "cores": str(cores()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def hardware() -> dict[str, object]:
    """Return this process's machine, and under "slurm" the variables of its Slurm job (empty outside a job)."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    slurm = {name.removeprefix("SLURM_").lower(): os.environ[name] for name in _JOB_VARIABLES if name in os.environ}
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "slurm": slurm,
    }


def cores() -> int:
    """Return the number of CPU cores that this process may use; on macOS, which restricts none, that of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Return the version of each installed package by name; of several copies, the first on Python's path counts.

    Copies inside setuptools are left out: they are on the path only after setuptools has been imported.
    """
    path = [folder for folder in sys.path if Path(folder).name != "_vendor"]
    versions: dict[str, str] = {}
    for package in distributions(path=path):
        if package.name:
            versions.setdefault(package.name, package.version)
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


_JOB_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
)


def is_checkout(source: Path) -> bool:
    """Return True if ``source`` is the top of a git checkout: a folder inside another project's checkout is not."""
    return (source / ".git").exists()


def commit_of(source: Path) -> str:
    """Return the commit of ``source``, with ``-dirty`` and a digest of its uncommitted changes, if any.

    A frozen copy has no git folder; its commit is in the file COMMIT.  An installed copy has a version only.
    """
    if (source / "COMMIT").is_file():
        return (source / "COMMIT").read_text().strip()
    if not is_checkout(source):
        return f"longctx {longctx.__version__}, not a git checkout"
    name = git(source, "describe", "--always", "--dirty", "--abbrev=12").strip() or "a checkout without git"
    return f"{name}-{hashlib.sha256(diff_of(source).encode()).hexdigest()[:8]}" if name.endswith("-dirty") else name


def diff_of(source: Path) -> str:
    """Return the uncommitted changes of ``source`` as a patch, followed by the names of untracked files.

    For a frozen copy, this is the content of its dirty.diff.  For an installed copy, it is empty.
    """
    if (source / "COMMIT").is_file():
        return (source / "dirty.diff").read_text()
    if not is_checkout(source):
        return ""
    new = git(source, "ls-files", "--others", "--exclude-standard")
    return git(source, "diff", "HEAD") + "".join(f"# not in git: {name}\n" for name in new.splitlines())


def git(source: Path, *words: str, errors: str = "backslashreplace") -> str:
    """Return the output of git in ``source``; an empty text if git fails or is not installed.

    ``errors`` is how bytes that are not UTF-8 are read.
    """
    command = ["git", "-C", str(source), *words]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors=errors, check=False).stdout
    except (FileNotFoundError, PermissionError):  # there is no such program
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
