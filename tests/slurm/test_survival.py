"""Runs that a cluster interrupts in every way it can; each resumes, and its curve is that of an undisturbed run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx import checkpoint_index
from recipes import pretrain
from tests.conftest import Cli
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import Job

# The time limit is far above what the tests need, because other work may occupy the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
RUN = (
    "recipe=pretrain",
    "experiment=pretrain/tiny",
    "data.length=61",
    "data.batch=2",
    "run.threads=1",
    "evaluate.every=0",
)
TWO = ("mesh.ring=2", "nodes=2", "time=30")
SAVES = "checkpoint.every=5"
STEPS = 80  # seconds of work after the first checkpoint, so that signals arrive before the end


def curve(out: Path) -> list[tuple[int, float, float, int]]:
    """Return step, loss, gradient norm and tokens of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


def steps_done(job: Job) -> int:
    """Return the number of steps in the job's metrics.jsonl."""
    file = job.folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_step(job: Job, steps: int) -> None:
    """Wait until the job has done ``steps`` steps."""
    wait_until(lambda: steps_done(job) >= steps, 500, lambda: f"step {steps} of job {job.number}: {job.logs()}")


def pid_of(job: Job, rank: int) -> int:
    """Return the process id of a rank of the job."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={rank}"} <= set(environment) and command[1:2] == ["-m"]:
            return int(process.name)
    raise AssertionError(f"rank {rank} of job {job.number} does not run: {job.logs()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture
def undisturbed(cli: Cli, folder: Path) -> list[tuple[int, float, float, int]]:
    """The curve of a run without Slurm and without interruptions, made once for all tests."""
    if not (folder / "whole").exists():
        words = (word for word in RUN if not word.startswith("recipe="))
        code, _, err = cli(pretrain, pretrain.task, *words, "mesh.ring=2", f"steps={STEPS}", f"out={folder / 'whole'}")
        assert code == 0, err
    return curve(folder / "whole")


RECIPE = """
import signal, sys, time
from pathlib import Path
began = Path(sys.argv[1])
if not began.exists():
    began.touch()
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(600)
"""


def test_run_stops_before_its_time_limit_and_is_requeued(submit_job, tmp_path):
    """Slurm sends the signal.  A script that stops at once replaces the recipe, because this tests the job script."""
    (tmp_path / "stops.py").write_text(RECIPE)
    stops = f"launcher.container={sys.executable} {tmp_path / 'stops.py'} {tmp_path / 'began'}"
    job = submit_job(*RUN, "steps=1", "time=1", "warning=50", f"folder={tmp_path / 'run'}", stops)
    job.wait_for_end()
    assert job.restarts == 1
    assert "stopped on request after saving: requeued" in (job.folder / "job.log").read_text()


def test_preempted_run_stops_and_is_requeued(submit_job, tmp_path):
    """A job in a partition of higher priority takes the nodes, and gets them well before the grace time is over."""
    (tmp_path / "stops.py").write_text(RECIPE)
    script = f"{sys.executable} {tmp_path / 'stops.py'} {tmp_path / 'began'}"
    all_cores = ("nodes=3", "mesh.ring=24", "steps=1", "data.length=97", "time=30")
    job = submit_job(*RUN, *all_cores, f"folder={tmp_path / 'run'}", f"launcher.container={script}")
    wait_until((tmp_path / "began").exists, 300, job.logs)
    urgent = submit_job(
        *RUN, *all_cores, f"folder={tmp_path / 'urgent'}", "launcher.partition=urgent", "launcher.container=true"
    )
    urgent.wait_for_end()
    job.wait_for_end()
    assert job.restarts == 1 and not (job.folder / "failures").exists()
    log = (job.folder / "job.log").read_text()
    assert log.count("stopped on request after saving: requeued") == 1, log


def test_killed_rank_and_requested_stop_leave_the_curve_unchanged(submit_job, undisturbed, folder, monkeypatch):
    """First SIGKILL, which failure.txt reports; then SIGUSR1, which saves at once.  All starts are one run of W&B."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder / "wandb"))
    job = submit_job(*RUN, *TWO, SAVES, f"steps={STEPS}", "track=wandb", f"folder={folder / 'hit'}")
    wait_for_step(job, 7)
    wait_until((job.folder / "checkpoints" / "step-00000005").is_dir, 300, job.logs)
    os.kill(pid_of(job, 1), signal.SIGKILL)
    wait_until(lambda: job.restarts == 1 and job.states == {"RUNNING"}, 300, job.logs)
    failure = (job.folder / "failure.txt").read_text()
    assert failure.startswith(f"rank 1 on n2 was killed by SIGKILL; last lines of {job.folder}/ranks/1.log:\n"), failure
    # The other rank reports the loss, or srun ends it with SIGTERM before it can.
    lost = r"^\+\d.* s: rank 0 on n1 (exited with 1: .*(lost rank 1|of ranks 0, 1 failed)|was killed by SIGTERM: )"
    assert re.search(lost, failure, re.MULTILINE), failure
    wait_until(lambda: "resuming after step" in (job.folder / "ranks" / "0.log").read_text(), 500, job.logs)
    before = steps_done(job)
    wait_for_step(job, before + 2)
    job.cluster.output("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for_end()
    assert job.restarts == 2 and (job.folder / "failures").read_text() == "1\n", "a requested stop is no failure"
    log = (job.folder / "ranks" / "0.log").read_text()
    (stopped,) = re.findall(r"stopped after step (\d+), as asked", log)
    assert f"resuming after step {stopped}, from" in log, "no step is done twice"
    assert curve(job.folder) == undisturbed
    check_single_wandb_run(job.folder)


def check_single_wandb_run(out: Path) -> None:
    """Check W&B's offline files: three starts under one id, all steps, settings and manifest."""
    run_id = checkpoint_index.read_metadata(checkpoint_index.latest_whole(out / "checkpoints")[0])["run_id"]
    starts = sorted((out / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(starts) == 3 == len(list((out / "wandb").glob("offline-run-*")))
    steps = set()
    for start in starts[1:]:  # SIGKILL left the first one incomplete
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(next(start.glob("*.wandb")))]
        lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        steps |= {record["history"]["step"]["num"] for record in records if record["type"] == "history"}
        (config, *_) = [record["run"]["config"]["update"] for record in records if record["type"] == "run"]
        assert config["mesh"]["ring"] == 2 and config["machine"]["host"] == "n1" and config["commit"]
        assert config["machine"]["slurm"]["job_nodelist"] == "n[1-2]" and "recipes.pretrain" in config["command"]
        manifest = json.loads((start / "files" / "manifest.json").read_text())
        assert manifest["module"] == "recipes.pretrain" and manifest["mesh"]["ring"] == 2
    resumed = re.search(r"resuming after step (\d+)", (out / "ranks" / "0.log").read_text())
    assert resumed and steps == set(range(int(resumed[1]) + 1, STEPS + 1)), "all steps after the kill"


def test_run_resumes_on_another_node_after_a_node_dies(submit_job, undisturbed, folder, cluster: Cluster):
    words = (f"steps={STEPS}", f"folder={folder / 'node'}", "launcher.sbatch=['--exclude=n1']")
    job = submit_job(*RUN, *TWO, SAVES, *words)
    wait_for_step(job, 7)
    cluster.kill_node("n3")
    wait_until(lambda: "down" in cluster.output("sinfo", "-h", "-n", "n3", "-o", "%T"), 300, job.logs)
    cluster.start_node("n3")
    job.wait_for_end()
    assert job.restarts >= 1 and curve(job.folder) == undisturbed


def test_hanging_rank_fails_the_job_with_the_exchange_it_hung_in(submit_job, folder):
    job = submit_job(*RUN, *TWO, "steps=99999", "run.timeout_minutes=1", "restarts=0", f"folder={folder / 'hung'}")
    wait_for_step(job, 3)
    os.kill(pid_of(job, 1), signal.SIGSTOP)
    began = time.monotonic()
    job.wait_for_end("FAILED")
    assert time.monotonic() - began > 50, "it failed for another reason"
    failure = (job.folder / "failure.txt").read_text()
    assert failure.startswith("rank 0 on n1 exited with 1; last lines of")
    assert re.search(r"LostPeer: (lost rank 1|\w+ of ranks 0, 1 failed: .*Timed out)", failure), failure


def test_ranks_are_placed_on_nodes_in_the_order_of_the_mesh(submit_job, tmp_path):
    """The ranks of the first axis, tensor parallel, share a node."""
    words = ("launcher.container=bash -c 'echo $SLURM_PROCID $(hostname)' say", f"folder={tmp_path / 'run'}")
    job = submit_job(*RUN, "mesh.tp=2", "mesh.ring=2", "nodes=2", "steps=1", "time=30", *words)
    job.wait_for_end()
    hosts = [(job.folder / "ranks" / f"{rank}.log").read_text().split() for rank in range(4)]
    assert hosts == [["0", "n1"], ["1", "n1"], ["2", "n2"], ["3", "n2"]]
