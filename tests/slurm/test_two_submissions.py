"""Submissions into one folder at the same time: one is queued, and the other changes nothing."""

import os
import threading
from pathlib import Path

import pytest

from recipes.common.lock import hold
from slurm import cluster, plan, submit
from slurm.plan import plan_job
from slurm.settings import Launcher, SubmitSettings
from tests.slurm.conftest import TINY

WORDS = (*TINY, "evaluate.every=0")


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Slurm accepts every job as number 7, which then waits; ``answers`` lists the numbers of cancelled jobs."""
    monkeypatch.chdir(tmp_path)
    cancelled: list[int] = []
    calls = {
        **dict.fromkeys(("refuse_no_slurm", "refuse_unfit_cluster", "refuse_rejected_script"), lambda *_: None),
        "queue": lambda _: 7,
        "cancel": cancelled.extend,
        "is_active": lambda _: True,
    }
    for name, call in calls.items():
        monkeypatch.setattr(cluster, name, call)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return cancelled


def contents(folder: Path) -> dict[Path, str | None]:
    """Return the text of each file below ``folder``, None for folders, without lock files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != submit.LOCK]
    return {path: path.read_text(errors="replace") if path.is_file() else None for path in paths}


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_folder_that_another_submission_locks_is_refused_and_unchanged(tmp_path, answers, launcher):
    """Both were checked when the folder did not exist; the other one has frozen its code, and is queueing it."""
    plans = submit.make_plans([*WORDS, f"launcher={launcher}", "folder=run"])
    with hold(tmp_path / "run" / submit.LOCK, "folder=run"):
        (tmp_path / "run" / "code").mkdir()
        (tmp_path / "run" / "code" / "COMMIT").write_text("of the other")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"folder=\S*/run is in use by process {os.getpid()} on"):
            submit.submit(plans)
        assert contents(tmp_path) == before and not answers


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_folder_whose_job_was_queued_after_the_check_is_refused_and_unchanged(tmp_path, answers, launcher):
    """Otherwise both jobs would run with one ``out``."""
    first, second = (
        submit.make_plans([*WORDS, f"optim.lr={rate}", f"launcher={how}", "folder=run"])
        for rate, how in (("1e-3", "slurm"), ("3e-4", launcher))
    )
    assert submit.submit(first) == [7] and (tmp_path / "run" / "job.id").read_text() == "7\n"
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"folder=\S*/run belongs to job 7, which waits or runs"):
        submit.submit(second)
    assert contents(tmp_path) == before and not answers


def test_folder_is_locked_from_the_check_by_slurm_until_its_job_has_a_number(tmp_path, answers, monkeypatch):
    plans = submit.make_plans([*WORDS, "folder=run"])
    refusals = []

    def refuse(*_: object) -> int:
        with pytest.raises(ValueError, match="is in use"), hold(tmp_path / "run" / submit.LOCK, "folder=run"):
            pass
        refusals.append(len(contents(tmp_path / "run")) > 0)
        return 7

    for name in ("refuse_rejected_script", "queue"):
        monkeypatch.setattr(cluster, name, refuse)
    submit.submit(plans)
    assert refusals == [False, True], "locked while the folder is empty, and when it has the code"
    with hold(tmp_path / "run" / submit.LOCK, "folder=run"):
        pass


def test_pipeline_whose_second_folder_is_in_use_cancels_and_deletes_its_first(tmp_path, answers):
    steps = "\n".join(f"- {' '.join(WORDS)} folder=new/{name}" for name in "ab")
    (tmp_path / "steps.yaml").write_text(steps)
    plans = submit.make_plans(["pipeline=steps.yaml"])
    with hold(tmp_path / "new" / "b" / submit.LOCK, "folder=b"):
        (tmp_path / "new" / "b" / "mine").touch()
        with pytest.raises(ValueError, match="in use by process"):
            submit.submit(plans)
        assert answers == [7]
        assert set(contents(tmp_path / "new")) == {tmp_path / "new" / "b", tmp_path / "new" / "b" / "mine"}


def test_job_whose_number_cannot_be_written_is_cancelled(tmp_path, answers, monkeypatch):
    """Without job.id, a second submission into this folder would not be refused."""
    write = submit.write_text

    def full_disk(path: Path, text: str) -> None:
        if path.name == submit.JOB:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(submit, "write_text", full_disk)
    with pytest.raises(ValueError, match="No space left"):
        submit.submit(submit.make_plans([*WORDS, "folder=run"]))
    assert answers == [7] and not (tmp_path / "run").exists()


def test_new_folders_of_one_second_differ_between_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan.time, "strftime", lambda _: "20260102-030405")
    settings = SubmitSettings(recipe="pretrain", dry_run=True)
    folders = []
    for process in (123, 456):
        monkeypatch.setattr(plan.os, "getpid", lambda process=process: process)
        folders.append(plan_job(settings, Launcher(), WORDS[1:]).folder)
    assert len(set(folders)) == 2 and {folder.parent for folder in folders} == {tmp_path / "outputs" / "slurm"}


def test_lock_is_taken_in_a_folder_that_others_remove(tmp_path):
    """A rejected submission removes its new folder, perhaps just when another one opens a lock file there."""
    folder, done = tmp_path / "run", threading.Event()

    def remove() -> None:
        while not done.is_set():
            try:
                folder.rmdir()
            except OSError:
                continue

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for _ in range(300):
            with hold(folder / submit.LOCK, "folder=run"):
                pass
    finally:
        done.set()
        remover.join()
