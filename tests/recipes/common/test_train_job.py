"""The folder of a training run: what a start leaves, and what a corrected start may replace."""

import json
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from longctx.config import DataSettings, LoRA, Mesh, TextSource
from longctx.hf.config import shape_of
from recipes.common.train_job import refuse_offload, refuse_offload_folder, refuse_unsplit
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


def write_in(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["tekken.json", "additional_chat_templates/rag.jinja", "generation_config.json"])
def test_run_of_an_earlier_version_may_lack_files_but_not_have_others(job_of, name):
    job = job_of(3)
    write_in(job.target.folder, name, "{}")
    begin_run(job)
    (job.out / "checkpoints" / "step-00000002").mkdir(parents=True)
    refuse_other_model(job)
    write_in(job.scratch, name, '{"other": 3}')
    with pytest.raises(ValueError, match=rf"has a run whose model has another {name}: restore"):
        refuse_other_model(job)
    (job.scratch / name).unlink()
    refuse_other_model(job)


def test_every_additional_chat_template_is_compared_if_the_run_has_one(job_of):
    job, folder = job_of(3), "additional_chat_templates"
    write_in(job.target.folder, f"{folder}/rag.jinja", "rag")
    begin_run(job)
    (job.out / "checkpoints" / "step-00000002").mkdir(parents=True)
    write_in(job.target.folder, f"{folder}/tool_use.jinja", "tool")
    with pytest.raises(ValueError, match=rf"has another {folder}/tool_use\.jinja"):
        refuse_other_model(job)


@pytest.mark.parametrize(
    ("before", "now", "is_accepted"),
    [
        ({"top_k": 3}, {"top_k": 3, "eos_token_id": 5}, True),
        ({"top_k": 3, "eos_token_id": None}, {"top_k": 3, "eos_token_id": [5, 7]}, True),
        ({"top_k": 3}, {"top_k": 4, "eos_token_id": 5}, False),
        ({"eos_token_id": 3}, {"eos_token_id": 5}, False),
        ({"eos_token_id": 3}, {}, False),
        ([], {"eos_token_id": 5}, False),
    ],
    ids=str,
)
def test_generation_config_may_have_gained_its_end_token(job_of, before, now, is_accepted):
    """A run on conversations needs it there, even where an earlier version read it from config.json."""
    job = job_of(3)
    write_in(job.target.folder, "generation_config.json", json.dumps(before))
    begin_run(job)
    (job.out / "checkpoints" / "step-00000002").mkdir(parents=True)
    write_in(job.target.folder, "generation_config.json", json.dumps(now))
    with nullcontext() if is_accepted else pytest.raises(ValueError, match=r"has another generation_config\.json"):
        refuse_other_model(job)


def test_only_the_first_rank_of_a_launcher_makes_the_folder(job_of, under_torchrun):
    under_torchrun(1, 2)
    begin_run(job_of(3))
    assert not job_of(3).out.exists()


@pytest.mark.parametrize(
    ("device", "layers", "lora", "where", "words"),
    [
        ("cpu", "auto", None, "host", "offload=host is for GPUs: give a folder on a disk, or use offload=null"),
        ("cpu", "auto", None, "none", "offload=none names no place: use offload=FOLDER, on a disk, or"),
        ("cpu", "auto", None, "", "offload= names no place: use offload=FOLDER, on a disk, or"),
        ("cuda", "local", None, "none", "offload=none names no place: use offload=host, or"),
        ("cuda", "local", None, "folder", "offload=folder on a GPU: use offload=host$"),
        (
            "cuda",
            "auto",
            None,
            "folder",
            "offload=folder on a GPU: use offload=host model.layers=local, since",
        ),
        ("cuda", "auto", None, "host", "offload=host on a GPU: use model.layers=local, since"),
        ("cuda", "auto", 3, "host", None),
        ("cuda", "local", None, "host", None),
        ("cpu", "auto", None, "folder", None),
        ("cpu", "auto", None, None, None),
    ],
)
def test_activations_are_offloaded_to_another_memory(device, layers, lora, where, words):
    model, shape = SimpleNamespace(layers=layers), SimpleNamespace(mixture=None)
    target = SimpleNamespace(run=SimpleNamespace(device=device), model=model, shape=shape)
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        refuse_offload(target, where, LoRA(rank=lora))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("/dev/shm/folder", "offload=/dev/shm/folder is in a tmpfs, which is memory: give a folder on a disk"),
        ("/proc/folder", "offload=/proc/folder cannot be written .*: give a writable folder"),
    ],
)
def test_folder_on_no_disk_is_refused(where, words):
    with pytest.raises(ValueError, match=words):
        refuse_offload_folder(where)


def test_a_system_without_the_calls_for_files_is_refused(monkeypatch, tmp_path):
    refuse_offload_folder(str(tmp_path / "new"))
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(ValueError, match=r"offload=\S+ needs Linux: use offload=null and recompute=full"):
        refuse_offload_folder(str(tmp_path))


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
