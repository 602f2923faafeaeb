"""A place has one writer at a time; the lock names its holder, and ends with the holder's process."""

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from recipes.common import lock
from recipes.common.lock import hold, lock_beside

HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print(sys.argv[2], end="", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path):
    """``other_process(job, host)``: a process that holds tmp_path/run/.lock and has written job and host into it."""
    processes = []

    def start(job=None, host="node7"):
        (tmp_path / "run").mkdir()
        about = json.dumps({"host": host, "process": 4711, "job": job})
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock"), about]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    file = tmp_path / "new" / "run" / ".lock"
    with hold(file, "out=run"):
        words = rf"out=run is in use by process {os.getpid()} on {socket.gethostname()}: wait until it ends"
        with pytest.raises(ValueError, match=words), hold(file, "out=run"):
            pytest.fail("both hold it")
    assert not list(file.parent.iterdir())
    with hold(file, "out=run"):
        assert file.is_file()


def test_forked_process_does_not_inherit_a_lock(tmp_path):
    """A writer of checkpoints is forked from the rank, and may outlive it."""
    (read, write), (started, starts) = os.pipe(), os.pipe()
    with hold(tmp_path / ".lock", "out=run"):
        os.link(tmp_path / ".lock", tmp_path / "link")  # the file of a killed process stays
        child = os.fork()
        if not child:
            os.close(write)
            os.write(starts, b"x")
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
    os.read(started, 1)
    try:
        with (tmp_path / "link").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(write)
        os.waitpid(child, 0)
        for end in (read, started, starts):
            os.close(end)


def test_lock_of_a_killed_process_is_free(tmp_path, other_process):
    process = other_process()
    with pytest.raises(ValueError, match=r"process 4711 on node7"), hold(tmp_path / "run" / ".lock", "out=run"):
        pytest.fail("both hold it")
    process.kill()
    process.wait()
    with hold(tmp_path / "run" / ".lock", "out=run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == os.getpid()


def test_requeued_job_waits_for_the_lock_of_its_dead_node(tmp_path, other_process, monkeypatch):
    """A network file system releases the locks of a dead node after a while."""
    process, waited = other_process(job="12"), []

    def sleep(_):
        waited.append(process.kill() or process.wait())

    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with hold(tmp_path / "run" / ".lock", "out=run"):
        assert len(waited) == 1


@pytest.mark.parametrize(("job", "host"), [("13", "node7"), ("12", socket.gethostname())])
def test_other_job_and_live_process_of_this_host_are_not_waited_for(tmp_path, other_process, monkeypatch, job, host):
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    other_process(job, host)
    with pytest.raises(ValueError, match=rf"\(Slurm job {job}\)"), hold(tmp_path / "run" / ".lock", "out=run"):
        pytest.fail("both hold it")


def test_only_the_first_rank_of_a_launcher_holds(tmp_path, under_torchrun):
    with hold(tmp_path / "lock", "out=run"):
        under_torchrun(1, 2)
        with hold(tmp_path / "lock", "out=run"):
            pass
        under_torchrun(0, 2)
        with pytest.raises(ValueError, match="out=run is in use"), hold(tmp_path / "lock", "out=run"):
            pytest.fail("both hold it")


def test_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "lock", "out=run"):
        assert "out=run: its file system has no locks (Function not implemented)" in capsys.readouterr().err


def test_without_locks_the_file_of_a_later_run_is_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "lock", "out=run"):
        (tmp_path / "lock").write_text('{"host": "node7", "process": 4711, "job": null}')
    assert (tmp_path / "lock").is_file()
    with hold(tmp_path / "lock", "out=run"):
        pass
    assert not (tmp_path / "lock").exists(), "its own file is removed"


def test_lock_of_a_folder_that_is_replaced_lies_beside_it(tmp_path):
    assert lock_beside(tmp_path / "talk") == tmp_path / ".talk.lock"


def test_lock_that_cannot_be_made_is_an_error_at_once(tmp_path):
    link = tmp_path / "x.lock"
    link.symlink_to(tmp_path / "missing" / "x.lock")
    with pytest.raises(FileNotFoundError), lock.hold(link, "out=x"):
        pass
