"""The commands of slurm/README.md, as they stand, one after the other."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until

# Far more than they take: other work may have the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    text = (ROOT / "slurm" / "README.md").read_text()
    (block,) = re.findall(r"^## Ten commands$.*?^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return block.splitlines()


def test_ten_commands_from_a_login_node_to_a_finished_sweep(cluster: Cluster, tmp_path):
    for name in (".venv", "configs", "longctx", "recipes", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(commands()) == 10
    environment = {**os.environ, "WANDB_MODE": "offline"}
    activate, *others = commands()
    said = []
    for command in others:
        done = subprocess.run(
            ["bash", "-c", f"{activate} && {command}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        said.append(done.stdout)
        if command.startswith("squeue"):
            wait_until(lambda: not cluster.says("squeue", "-h").strip(), 900, lambda: "an empty queue")
    assert said[1].startswith("#!/bin/bash\n#SBATCH --job-name=generate")
    assert (tmp_path / "outputs" / "hf" / "model.safetensors").is_file(), "the second job came after the first"
    assert re.search(r"^\s*optim\.lr\s+0\.001\s+0\.0003\s*$", said[6], re.MULTILINE) and "loss" in said[6], said[6]
    assert '"module": "recipes.pretrain"' in said[7]
    assert (tmp_path / "outputs" / "sweep" / "0-again" / "metrics.jsonl").is_file()
