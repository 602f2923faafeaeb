"""One real Slurm for all tests here, or the reason why there is none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import submit
from tests.slurm.cluster import Cluster, missing, wait_until

Submit = Callable[..., "Job"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes."""
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("WANDB_MODE", "offline")
        yield cluster
        cluster.stop()
        assert not cluster.left()


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    number: int
    run: Path
    cluster: Cluster

    @property
    def states(self) -> set[str]:
        """The job's state, or those of its tasks."""
        return set(self.cluster.says("squeue", "-h", "-t", "all", "-j", str(self.number), "-o", "%T").split())

    @property
    def restarts(self) -> int:
        shown = self.cluster.says("scontrol", "show", "job", str(self.number))
        return int(shown.partition("Restarts=")[2].split()[0])

    def ends(self, state: str = "COMPLETED", seconds: float = 500) -> None:
        """Wait for the job's end; AssertionError, with its logs, if it is another than ``state``."""
        wait_until(lambda: self.states <= set(OVER), seconds, lambda: f"job {self.number} ends: {self.logs()}")
        assert self.states == {state}, self.logs()

    def runs(self) -> None:
        wait_until(lambda: self.states == {"RUNNING"}, 300, lambda: f"job {self.number} runs")

    def logs(self) -> str:
        """All that the job has said."""
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in sorted(self.run.rglob("*.log")))


@pytest.fixture
def submitted(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Submit:
    """``submitted(*words)``: what python -m slurm.submit prints, as a job."""

    def run(*words: str) -> Job:
        capsys.readouterr()
        submit.main(words)
        told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
        return Job(int(told["job"]), Path(told["run"]), cluster)

    return run


@pytest.fixture
def queue(cluster: Cluster) -> Callable[[], list[str]]:
    """Every job that there ever was."""
    return lambda: cluster.says("squeue", "-h", "-t", "all", "-o", "%A").split()
