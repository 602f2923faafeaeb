"""slurm/README.md: its ten commands run one after the other, and its tables have short cells."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    text = (ROOT / "slurm" / "README.md").read_text()
    (block,) = re.findall(r"^## Ten commands$.*?^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return block.replace("\\\n", " ").splitlines()


def test_no_table_cell_is_longer_than_100_characters():
    rows = [line for line in (ROOT / "slurm" / "README.md").read_text().splitlines() if line.startswith("|")]
    assert rows and max(len(cell.strip()) for row in rows for cell in row.split("|")) <= 100


@pytest.mark.slurm
@pytest.mark.timeout(1800)  # far above what it needs, because other work may occupy the cores
def test_ten_commands_from_a_login_node_to_a_finished_sweep(cluster: Cluster, tmp_path):
    for name in (".venv", "configs", "longctx", "recipes", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(commands()) == 10
    environment = {**os.environ, "WANDB_MODE": "offline"}
    activate, *others = commands()
    outputs = []
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
        outputs.append(done.stdout)
        if command.startswith("squeue"):
            wait_until(
                lambda: not cluster.output("squeue", "-h").strip(),
                900,
                lambda: f"an empty queue: {cluster.output('squeue')}",
            )
    assert outputs[1].startswith("#!/bin/bash\n#SBATCH --job-name=generate")
    assert (tmp_path / "outputs" / "hf" / "model.safetensors").is_file(), "the second job came after the first"
    compared = outputs[6]
    assert re.search(r"^\s*optim\.lr\s+0\.001\s+0\.0003\s*$", compared, re.MULTILINE) and "loss" in compared, compared
    assert '"module": "recipes.pretrain"' in outputs[7]
    assert (tmp_path / "outputs" / "sweep" / "0-again" / "metrics.jsonl").is_file()
