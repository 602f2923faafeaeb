"""megatron-core is imported without torch's compiler, W&B and broken packages."""

import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from longctx.megatron import hide_if_broken

SCRIPT = """
import sys, torch
from pathlib import Path
before = torch.compile, torch.compiler.disable
import longctx.infer.engine, longctx.train.step
from longctx.hf.config import shape_of
shape_of(Path(sys.argv[1]))
assert (torch.compile, torch.compiler.disable) == before
print("torch._dynamo" in sys.modules, "wandb" in sys.modules)
import wandb
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="on a CUDA build megatron-core's fusions are compiled")
def test_importing_megatron_core_and_reading_a_model_loads_no_compiler_and_no_wandb(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"__init__": "raise RuntimeError('Found empty package\\nwith advice')"},
            r"\(Found empty package\): mend",
        ),
        ({"__init__": "", "pytorch": "open('no.so')"}, r"half_engine is not used.*No such file.*: mend it"),
    ],
    ids=["package without core", "core without extension"],
)
def test_half_installed_package_looks_uninstalled(tmp_path, monkeypatch, files, message):
    """megatron-core catches ImportError only, so another error would stop every recipe."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_engine").mkdir()
    for name, source in files.items():
        (tmp_path / "half_engine" / f"{name}.py").write_text(source)
    monkeypatch.setitem(sys.modules, "half_engine", None)  # removed again after the test
    del sys.modules["half_engine"]
    with pytest.warns(UserWarning, match=message):
        hide_if_broken("half_engine", "mend it")
    with pytest.raises(ImportError):
        importlib.import_module("half_engine.pytorch")


def test_tensors_are_pickled_without_a_function_of_megatron_core():
    """Otherwise a process that reads a tensor from a rank would import megatron-core, with its warnings."""
    assert b"megatron" not in pickle.dumps(torch.ones(3))


def test_absent_package_is_no_reason_for_a_warning():
    hide_if_broken("no_such_engine", "mend it")
    assert "no_such_engine" not in sys.modules
