"""megatron-core is imported without torch's compiler and W&B, and leaves both as they were."""

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys, torch
compile_ = torch.compile
import longctx.infer.engine, longctx.train.step
assert torch.compile is compile_
print("torch._dynamo" in sys.modules, "wandb" in sys.modules)
import wandb
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="on a CUDA build megatron-core's fusions are compiled")
def test_import_of_megatron_core_loads_no_compiler_and_no_wandb():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
