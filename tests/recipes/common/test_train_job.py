"""The folder of a training run: what a start leaves, and what a corrected start may replace."""

import json
import shutil
from types import SimpleNamespace

import pytest

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
    with pytest.raises(ValueError, match=r"has a run of another model, or of another context"):
        refuse_other_model(job_of(5))
    begin_run(job_of(5))
    assert layers_in(job_of(5)) == 3


def test_only_the_first_rank_of_a_launcher_makes_the_folder(job_of, under_torchrun):
    under_torchrun(1, 2)
    begin_run(job_of(3))
    assert not job_of(3).out.exists()
