"""The folder of a training run: what a start leaves, and what a corrected start may replace."""

import json
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from longctx.config import DataSettings, Mesh, TextSource
from longctx.hf.config import shape_of
from recipes.common.train_job import refuse_offload, refuse_unsplit
from recipes.common.train_resume import begin_run, refuse_other_model


@pytest.fixture
def job_of(tiny, tmp_path):
    """``job_of(layers)``: a job, whose model has this many layers, in the folder tmp_path/run."""

    def make(layers):
        folder, out = tmp_path / f"model{layers}", tmp_path / "run"
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
        target = SimpleNamespace(folder=folder)
        return SimpleNamespace(out=out, scratch=out / "model", target=target, text_digests={})

    return make


def layers_in(job):
    return json.loads((job.scratch / "config.json").read_text())["num_hidden_layers"]


def test_model_of_a_start_without_a_checkpoint_is_replaced(job_of):
    begin_run(job_of(3))
    refuse_other_model(job_of(5))
    begin_run(job_of(5))
    assert layers_in(job_of(5)) == 5


@pytest.mark.parametrize("place", ["checkpoints/step-00000002", "model/model.safetensors"])
def test_model_of_a_checkpoint_or_with_weights_stays(job_of, place):
    begin_run(job_of(3))
    (job_of(3).out / place).mkdir(parents=True)
    begin_run(job_of(3))
    with pytest.raises(ValueError, match=r"has a run of another model, or of this one with .* give another out="):
        refuse_other_model(job_of(5))
    begin_run(job_of(5))
    assert layers_in(job_of(5)) == 3


def test_only_the_first_rank_of_a_launcher_makes_the_folder(job_of, under_torchrun):
    under_torchrun(1, 2)
    begin_run(job_of(3))
    assert not job_of(3).out.exists()


@pytest.mark.parametrize(
    ("device", "layers", "where", "words"),
    [
        ("cpu", "auto", "host", "offload=host does not fit run.device=cpu: use a folder on a disk, or offload=null"),
        ("cuda", "local", "folder", "does not fit run.device=cuda: use offload=host"),
        (
            "cuda",
            "auto",
            "host",
            "not tested with Transformer Engine, which model.layers=auto may use: use model.l",
        ),
        (
            "cpu",
            "auto",
            "/dev/shm/folder",
            "offload=/dev/shm/folder is in a tmpfs, which is memory: give a folder",
        ),
        ("cpu", "auto", "/proc/folder", "offload=/proc/folder cannot be written .*: give a writable folder"),
        ("cpu", "auto", None, None),
        ("cuda", "local", "host", None),
    ],
)
def test_activations_are_offloaded_to_another_memory(device, layers, where, words):
    target = SimpleNamespace(run=SimpleNamespace(device=device), model=SimpleNamespace(layers=layers))
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        refuse_offload(target, where)


def test_a_system_without_the_calls_for_files_is_refused(monkeypatch, tmp_path):
    target = SimpleNamespace(run=SimpleNamespace(device="cpu"))
    refuse_offload(target, str(tmp_path))
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(ValueError, match=r"offload=\S+ needs Linux: use offload=null and recompute=full"):
        refuse_offload(target, str(tmp_path))


@pytest.mark.parametrize(
    ("mesh", "changed", "words"),
    [
        (Mesh(pp=2), {}, "mesh.pp=2: the router loss .* use mesh.pp=1, or output_router_logits=false"),
        (Mesh(), {"last": "pad"}, "data.last=pad: the router loss .* use drop, or output_router_logits=false"),
        (Mesh(), {"conversations": "whole"}, "data.conversations=whole: the router loss .* use split, or output"),
    ],
)
def test_router_loss_on_stages_or_with_padding_is_refused(tmp_path, mesh, changed, words):
    data = DataSettings((TextSource(pydoc="train"),), 61, 2, end_token=False, **changed)
    for coefficient in (0.0, 0.1):
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
        config = {**sizes, "model_type": "mixtral", "output_router_logits": True, "router_aux_loss_coef": coefficient}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if coefficient:
            with pytest.raises(ValueError, match=words):
                refuse_unsplit(mesh, shape_of(tmp_path), data)
        else:
            refuse_unsplit(mesh, shape_of(tmp_path), data)
