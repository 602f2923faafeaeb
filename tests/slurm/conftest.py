"""One real Slurm for all tests of this folder; they are skipped where there can be none."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import submit
from tests.slurm.cluster import Cluster, wait_until, why_unavailable

SubmitJob = Callable[..., "Job"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TINY = ("recipe=pretrain", "experiment=pretrain/tiny", "data.length=61", "data.batch=2", "steps=3", "run.threads=1")


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """``refused(*words)`` returns the one line with which the command line is refused; it must leave no file."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as leaving:
            submit.main(words)
        out, err = capsys.readouterr()
        assert leaving.value.code == 2 and not out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def script(capsys, tmp_path, monkeypatch):
    """``script(*words)`` returns the job script of a command line; bash accepts it, and nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        submit.main([*words, "dry_run=true"])
        shown = capsys.readouterr().out
        subprocess.run(["bash", "-n"], input=shown, text=True, check=True)
        assert sorted(tmp_path.rglob("*")) == before
        return shown

    return run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes."""
    if reason := why_unavailable():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("WANDB_MODE", "offline")
        yield cluster
        cluster.stop()
        assert not cluster.processes()


@dataclass(frozen=True)
class Job:
    """A submitted job and its folder."""

    number: int
    folder: Path
    cluster: Cluster

    @property
    def states(self) -> set[str]:
        """The job's state, or the states of an array's tasks."""
        return set(self.cluster.output("squeue", "-h", "-t", "all", "-j", str(self.number), "-o", "%T").split())

    @property
    def restarts(self) -> int:
        """Number of times that Slurm has restarted the job."""
        shown = self.cluster.output("scontrol", "show", "job", str(self.number))
        return int(shown.partition("Restarts=")[2].split()[0])

    def wait_for_end(self, state: str = "COMPLETED", seconds: float = 500) -> None:
        """Wait for the job's end.  Raises AssertionError, with its logs, if it does not end in ``state``."""
        wait_until(lambda: self.states <= set(OVER), seconds, lambda: f"job {self.number} ends: {self.logs()}")
        assert self.states == {state}, self.logs()

    def wait_for_start(self) -> None:
        """Wait until the job runs."""
        wait_until(lambda: self.states == {"RUNNING"}, 300, lambda: f"job {self.number} runs")

    def logs(self) -> str:
        """Return the contents of all log files in the job's folder."""
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in sorted(self.folder.rglob("*.log")))


@pytest.fixture
def submit_job(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> SubmitJob:
    """``submit_job(*words)`` runs python -m slurm.submit and returns the job that it prints."""

    def submit_words(*words: str) -> Job:
        capsys.readouterr()
        submit.main(words)
        printed = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
        return Job(int(printed["job"]), Path(printed["run"]), cluster)

    return submit_words


@pytest.fixture
def all_jobs(cluster: Cluster) -> Callable[[], list[str]]:
    """``all_jobs()`` returns the numbers of all jobs so far, ended ones included."""
    return lambda: cluster.output("squeue", "-h", "-t", "all", "-o", "%A").split()
