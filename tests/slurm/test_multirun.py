"""Hydra's own multirun: each run has a separate folder, on this machine and on a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SWEEP = (
    "experiment=pretrain/tiny",
    "data.length=61",
    "data.batch=2",
    "run.threads=1",
    "evaluate.every=0",
    "optim.lr=1e-3,2e-3",
)


def check_multirun(folder: Path, *words: str) -> None:
    """Run a sweep of two runs of two steps, and check the metrics and the manifest that each has written."""
    command = [sys.executable, "-m", "recipes.pretrain", "-m", *SWEEP, "steps=2", f"out={folder / 'run'}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rates = []
    for number in range(2):
        lines = (folder / "run" / str(number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        rates.append(json.loads((folder / "run" / str(number) / "manifest.json").read_text())["config"]["optim"]["lr"])
    assert rates == [1e-3, 2e-3]


@pytest.mark.timeout(1800)
def test_multirun_on_this_machine(tmp_path):
    check_multirun(tmp_path)


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_multirun_on_a_cluster_with_two_nodes_each(cluster: Cluster, tmp_path):
    two = ("mesh.ring=2", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1")
    check_multirun(tmp_path, "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=30", *two)
