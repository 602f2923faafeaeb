"""A folder's tensors, its fingerprint, and the advice to export the training run to which it belongs."""

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from longctx.hf.checkpoint import export_advice, fingerprint, tensor_files
from recipes import export
from recipes.common.cli import compose_config
from recipes.common.overrides import as_overrides
from tests.hf.configs import SIZES, save_config


@pytest.fixture
def run(tmp_path):
    """A run's folder, with a space in its name and a checkpoint."""
    checkpoint = tmp_path / "a run" / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").touch()
    return tmp_path / "a run"


def test_command_is_quoted_for_a_shell(run):
    advice = export_advice(run)
    command = advice.partition("export that with ")[2].partition(", then give ")[0]
    assert shlex.split(command) == ["python", "-m", "recipes.export", f"checkpoint={run}", f"to={run}/hf"]
    assert shlex.split(advice.partition(", then give ")[2]) == [f"model={run}/hf"]


def test_path_that_recipes_would_read_as_a_list_is_quoted(tmp_path):
    run = tmp_path / "lr=1,seed=2"
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    command = export_advice(run).partition("export that with ")[2].partition(", then give ")[0]
    config = compose_config("export", as_overrides("export", shlex.split(command)[3:], pytest.fail))
    assert (config.checkpoint, config.to) == (str(run), f"{run}/hf")


def test_run_that_was_exported_before_names_the_export(run):
    """The command would be refused: its folder exists."""
    (run / "hf").mkdir()
    (run / "hf" / "config.json").touch()
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step-00000020"):
        advice = export_advice(folder)
        assert f"give 'model={run}/hf', which may be of an earlier" in advice and "recipes.export" not in advice


def test_checkpoint_at_the_top_of_a_file_system_has_no_run(monkeypatch):
    """For example, a checkpoint that is mounted in a container."""
    assert export.model_of(Path("/a_checkpoint")) == Path("/model")
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "run.json")
    for folder in ("/a_checkpoint", "/"):
        assert f"checkpoint={folder} to=/hf" in export_advice(Path(folder))
    with pytest.raises(ValueError, match=r"/model has no config.json: copy both, to RUN/checkpoints/a_checkpoint"):
        export.refuse_unexportable(Path("/a_checkpoint"), Path("/hf"))


def test_tensors_are_in_one_file_or_in_those_of_the_index(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors: this model has no weights yet, train it"):
        tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"has no model\.safetensors: convert"):
        tensor_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "y": "b"}}')
    assert tensor_files(tmp_path) == {"x": tmp_path / "a", "y": tmp_path / "b"}
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, tmp_path / "model.safetensors")
    assert tensor_files(tmp_path) == dict.fromkeys("xy", tmp_path / "model.safetensors"), (
        "the index is of an older save"
    )


@pytest.mark.parametrize("changed", ["first", "last"])
@pytest.mark.parametrize("at", [0, 1500, -1])
def test_fingerprint_differs_if_one_tensor_differs(tmp_path, changed, at):
    plain = {name: torch.zeros(3001) for name in ("first", "last")}
    other = {**plain, changed: plain[changed].index_fill(0, torch.tensor([at]), 1.0)}
    prints = []
    for name, tensors in (("a", plain), ("b", other), ("c", plain)):
        save_file(tensors, save_config(tmp_path / name, LlamaConfig(**SIZES)) / "model.safetensors")
        prints.append(fingerprint(tmp_path / name))
    assert prints[0] == prints[2] != prints[1]
