"""Transformer Engine's wheel, and a process that runs its Python code on CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

VERSION = "2.20.2"
ROOT = Path(__file__).parents[3]


def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="session")
def wheel() -> Path:
    """Folder of Transformer Engine's Python code, without its compiled core, which pip fetches once (1.2 MB)."""
    folder = Path(os.environ.get("LONGCTX_CACHE", "~/.cache/longctx")).expanduser() / f"transformer-engine-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade"]
            done = run([*pip, "--target", partial, f"transformer-engine=={VERSION}"])
            if done.returncode:
                pytest.skip(f"Transformer Engine's wheel cannot be fetched: {done.stderr.strip()[-300:]}")
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def run_checks(wheel: Path) -> Callable[[str, Path], None]:
    """``run_checks(module, path)``: run a module of this folder with the wheel; ``path`` says where it writes.

    Transformer Engine's small functions are not compiled.
    """

    def run_module(module: str, path: Path) -> None:
        settings = {"LONGCTX_TE": str(wheel), "OMP_NUM_THREADS": "1", "NVTE_TORCH_COMPILE": "0"}
        done = run([sys.executable, "-m", f"tests.megatron.te.{module}", path], env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr[-5000:]

    return run_module


def of_ranks(results: dict[str, Any], check: str) -> list[Any]:
    """Return the results of ``check`` by rank; the traceback of a rank that failed is an AssertionError."""
    ranks = results[check]
    assert not isinstance(ranks, str), ranks
    return ranks
