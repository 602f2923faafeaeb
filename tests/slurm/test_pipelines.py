"""Pipelines: jobs that wait for the ones before them, with folders of their own; all are queued or none."""

import re

import pytest

from slurm import cluster, submit
from tests.slurm.conftest import TINY


def test_pipeline_jobs_depend_on_the_one_before(script, tmp_path):
    steps = [f"- {' '.join(TINY)} folder=run", "- recipe=export checkpoint=run to=hf folder=out after=7"]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    first, second = script("pipeline=steps.yaml", "launcher.partition=night").split("#!/bin/bash\n")[1:]
    assert "dependency" not in first and "#SBATCH --dependency=afterok:7:JOB\n" in second
    assert first.count("--partition=night") == second.count("--partition=night") == 1


def test_jobs_of_a_pipeline_have_folders_and_files_of_their_own(script, refused, tmp_path):
    generate = "recipe=generate model=smollm2_135m prompt.pydoc=assert"
    steps = tmp_path / "steps.yaml"
    steps.write_text("\n".join([f"- {generate}"] * 3))
    places = re.findall(r"^run=(\S+)$", script("pipeline=steps.yaml"), re.MULTILINE)
    assert len(set(places)) == 3
    steps.write_text("\n".join([f"- {generate} out=a.json"] * 2))
    assert "two jobs of the pipeline write to out=" in refused("pipeline=steps.yaml")
    assert "two jobs of the pipeline have the folder" in refused("pipeline=steps.yaml", "folder=x")


def test_refused_pipeline_leaves_no_folder(refused, tmp_path):
    (tmp_path / "kept").mkdir()
    words = f"{' '.join(TINY)} launcher=local"
    steps = [f"- {words} folder=run", f"- {words} folder=kept", "- recipe=pretend folder=run2"]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    assert "recipe=pretend cannot be submitted" in refused("pipeline=steps.yaml")
    assert (tmp_path / "kept").is_dir(), "it existed before"


@pytest.fixture
def no_cluster(monkeypatch):
    """The checks of a cluster pass."""
    for name in ("refuse_no_slurm", "refuse_unfit_cluster", "refuse_rejected_script"):
        monkeypatch.setattr(cluster, name, lambda *_: None)


def test_rejected_pipeline_cancels_jobs_and_deletes_their_folders(tmp_path, monkeypatch, no_cluster):
    """Slurm rejects the third when the second is queued already; the first ran here and keeps its folder."""
    monkeypatch.chdir(tmp_path)
    words = f"{' '.join(TINY)} evaluate.every=0"
    launchers = {"a": "local", "b": "slurm", "c": "slurm", "d": "slurm"}
    steps = [f"- {words} folder={name} launcher={launcher}" for name, launcher in launchers.items()]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    monkeypatch.setattr(submit, "_run_locally", lambda *_: None)
    cancelled, jobs = [], iter([7])
    monkeypatch.setattr(cluster, "cancel", cancelled.extend)

    def queue(script):
        if script.parent.name == "c":
            raise ValueError("Slurm refuses: no")
        return next(jobs)

    monkeypatch.setattr(cluster, "queue", queue)
    plans = submit.make_plans(["pipeline=steps.yaml"])
    assert [(tmp_path / name).is_dir() for name in launchers] == [False] * 4
    with pytest.raises(ValueError, match="Slurm refuses: no"):
        submit.submit(plans)
    assert cancelled == [7]
    assert [(tmp_path / name).is_dir() for name in launchers] == [True, False, False, False]


def test_rejection_is_shown_if_earlier_jobs_cannot_be_cancelled(tmp_path, monkeypatch, no_cluster):
    """They may still run, in their folders."""
    monkeypatch.chdir(tmp_path)
    steps = [f"- {' '.join(TINY)} evaluate.every=0 folder={name}" for name in ("a", "b")]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))

    def queue(script):
        if script.parent.name == "b":
            raise ValueError("Slurm refuses: no")
        return 7

    def cancel(_):
        raise ValueError("scancel fails: no controller")

    monkeypatch.setattr(cluster, "queue", queue)
    monkeypatch.setattr(cluster, "cancel", cancel)
    plans = submit.make_plans(["pipeline=steps.yaml"])
    with pytest.raises(ValueError, match=r"Slurm refuses: no; .*\(scancel fails: no controller\): use scancel 7"):
        submit.submit(plans)
    assert [(tmp_path / name).is_dir() for name in ("a", "b")] == [True, False]


def test_local_job_that_would_not_wait_for_a_queued_one_is_refused(refused, tmp_path):
    steps = [f"- {' '.join(TINY)} folder={name} launcher={name}" for name in ("slurm", "local")]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    message = refused("pipeline=steps.yaml")
    assert "launcher=local runs at once, and does not wait for the pipeline's job pretrain" in message
    assert "does not wait for after=12: " in refused(*TINY, "folder=run", "launcher=local", "after=12")


def test_dry_run_is_for_all_jobs(refused, tmp_path):
    (tmp_path / "steps.yaml").write_text(f"- {' '.join(TINY)} folder=a\n- {' '.join(TINY)} folder=b dry_run=true\n")
    assert "dry_run is for all jobs of a pipeline: write it on the command line" in refused("pipeline=steps.yaml")


def test_rejected_job_leaves_its_folder_as_it_was(tmp_path, monkeypatch, no_cluster):
    monkeypatch.chdir(tmp_path)

    def reject(_):
        raise ValueError("Slurm refuses: no")

    monkeypatch.setattr(cluster, "refuse_rejected_script", reject)
    (tmp_path / "old" / "code").mkdir(parents=True)
    for name in ("code/COMMIT", "config.yaml", "failure.txt"):
        (tmp_path / "old" / name).write_text("of an earlier job")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    steps = "\n".join(f"- {' '.join(TINY)} evaluate.every=0 folder=new/deep/{name}" for name in "ab")
    (tmp_path / "steps.yaml").write_text(steps)
    before[tmp_path / "steps.yaml"] = steps
    answers = iter([None, ValueError("Slurm refuses: no")])

    def reject_second(_):
        if (answer := next(answers)) is not None:
            raise answer

    with monkeypatch.context() as patch:
        for name, call in {"refuse_rejected_script": reject_second, "queue": lambda _: 7, "cancel": list}.items():
            patch.setattr(cluster, name, call)
        with pytest.raises(ValueError, match="Slurm refuses: no"):
            submit.submit(submit.make_plans(["pipeline=steps.yaml"]))
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before
    for folder in ("old", "new/deep/run"):
        with pytest.raises(ValueError, match="Slurm refuses: no"):
            submit.submit(submit.make_plans([*TINY, "evaluate.every=0", f"folder={folder}"]))
        assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before
