"""Runs that are interrupted in every way that a cluster has, and go on as if they had not been."""

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
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import Job, Submit

# Far more than they take: other work may have the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
RUN = (
    "recipe=pretrain",
    "experiment=pretrain/tiny",
    "data.length=61",
    "data.batch=2",
    "run.threads=1",
    "evaluate.every=0",
)
TWO = ("mesh.ring=2", "nodes=2", "checkpoint.every=5", "time=30")
STEPS = 150


def curve(out: Path) -> list[tuple[int, float, float, int]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


def steps_done(job: Job) -> int:
    file = job.run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def reaches(job: Job, steps: int) -> None:
    wait_until(lambda: steps_done(job) >= steps, 500, lambda: f"step {steps} of job {job.number}: {job.logs()}")


def pid_of(job: Job, rank: int) -> int:
    """The process of the job's rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={rank}"} <= set(environment) and command[1:2] == ["-m"]:
            return int(process.name)
    raise AssertionError(f"rank {rank} of job {job.number} is not there: {job.logs()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture
def whole(submitted: Submit, folder: Path) -> list[tuple[int, float, float, int]]:
    """The curve of a run that nobody interrupts."""
    if not (folder / "whole").exists():
        submitted(*RUN, *TWO, f"steps={STEPS}", f"run={folder / 'whole'}").ends()
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


def test_before_the_time_limit_a_run_is_asked_to_stop_and_queued_again(submitted, tmp_path):
    """By Slurm's own clock.  What can stop at any time is in place of the recipe: this is about the script."""
    (tmp_path / "stops.py").write_text(RECIPE)
    stops = f"launcher.container={sys.executable} {tmp_path / 'stops.py'} {tmp_path / 'began'}"
    job = submitted(*RUN, "steps=1", "time=1", "warning=50", f"run={tmp_path / 'run'}", stops)
    job.ends()
    assert job.restarts == 1
    assert "stopped as asked, and saved: queued again" in (job.run / "job.log").read_text()


def test_a_run_that_gives_way_to_another_is_asked_to_stop_and_goes_on_afterwards(submitted, tmp_path):
    """Pre-emption: a partition of higher priority takes the nodes; well before its grace time is over it has them."""
    (tmp_path / "stops.py").write_text(RECIPE)
    script = f"{sys.executable} {tmp_path / 'stops.py'} {tmp_path / 'began'}"
    whole = ("nodes=3", "mesh.ring=24", "steps=1", "data.length=97", "time=30")  # all cores of all nodes
    job = submitted(*RUN, *whole, f"run={tmp_path / 'run'}", f"launcher.container={script}")
    wait_until((tmp_path / "began").exists, 300, job.logs)
    urgent = submitted(
        *RUN, *whole, f"run={tmp_path / 'urgent'}", "launcher.partition=urgent", "launcher.container=true"
    )
    urgent.ends()
    job.ends()
    assert job.restarts == 1 and not (job.run / "failures").exists()
    log = (job.run / "job.log").read_text()
    assert log.count("stopped as asked, and saved: queued again") == 1, log


def test_a_killed_rank_and_a_signal_leave_no_mark_on_the_curve(submitted, whole, folder, monkeypatch):
    """First kill -9, of which the job tells who, where and what; then SIGUSR1, which saves at once.  One run of W&B."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder / "wandb"))
    job = submitted(*RUN, *TWO, f"steps={STEPS}", "track=wandb", f"run={folder / 'hit'}")
    reaches(job, 7)
    os.kill(pid_of(job, 1), signal.SIGKILL)
    wait_until(lambda: job.restarts == 1 and job.states == {"RUNNING"}, 300, job.logs)
    told = (job.run / "failure.txt").read_text()
    assert told.startswith(f"rank 1 on n2 was killed by SIGKILL; its last lines, of {job.run}/ranks/1.log:\n"), told
    # Ended with it, if it could not say so soon enough.
    missed = r"^\+\d.* s: rank 0 on n1 (exited with 1: .*(lost rank 1|of ranks 0, 1 failed)|was killed by SIGTERM: )"
    assert re.search(missed, told, re.MULTILINE), told
    wait_until(lambda: "resuming after step" in (job.run / "ranks" / "0.log").read_text(), 500, job.logs)
    before = steps_done(job)
    reaches(job, before + 2)
    job.cluster.says("scancel", "--batch", "--signal=USR1", str(job.number))
    job.ends()
    assert job.restarts == 2 and (job.run / "failures").read_text() == "1\n", "to stop as asked is no failure"
    (stopped,) = re.findall(r"stopped after step (\d+), as asked", (job.run / "ranks" / "0.log").read_text())
    assert f"resuming after step {stopped}, from" in (job.run / "ranks" / "0.log").read_text(), "nothing is done twice"
    assert curve(job.run) == whole
    _is_one_run_of_wandb(job.run)


def _is_one_run_of_wandb(out: Path) -> None:
    """What its offline files have: three starts under one id, every step, and what exactly was run."""
    run_id = checkpoint_index.read_metadata(checkpoint_index.latest_whole(out / "checkpoints")[0])["run_id"]
    starts = sorted((out / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(starts) == 3 == len(list((out / "wandb").glob("offline-run-*")))
    steps = set()
    for start in starts[1:]:  # the first was killed
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
    assert resumed and steps == set(range(int(resumed[1]) + 1, STEPS + 1)), "all since it was killed"


def test_a_node_that_dies_is_replaced_and_the_run_goes_on(submitted, whole, folder, cluster: Cluster):
    job = submitted(*RUN, *TWO, f"steps={STEPS}", f"run={folder / 'node'}", "launcher.sbatch=['--exclude=n1']")
    reaches(job, 7)
    cluster.kill_node("n3")
    wait_until(lambda: "down" in cluster.says("sinfo", "-h", "-n", "n3", "-o", "%T"), 300, job.logs)
    cluster.start_node("n3")
    job.ends()
    assert job.restarts >= 1 and curve(job.run) == whole


def test_a_rank_that_hangs_ends_the_job_which_says_who_waited_for_what(submitted, folder):
    job = submitted(*RUN, *TWO, "steps=99999", "run.timeout_minutes=1", "restarts=0", f"run={folder / 'hung'}")
    reaches(job, 3)
    os.kill(pid_of(job, 1), signal.SIGSTOP)
    began = time.monotonic()
    job.ends("FAILED")
    assert time.monotonic() - began > 50, "it was another failure"
    told = (job.run / "failure.txt").read_text()
    assert told.startswith("rank 0 on n1 exited with 1; its last lines")
    assert re.search(r"LostPeer: (lost rank 1|\w+ of ranks 0, 1 failed: .*Timed out)", told), told


def test_ranks_lie_on_nodes_in_the_order_of_the_mesh(submitted, tmp_path):
    """The first axis, tensor parallel, is inside of a node."""
    words = ("launcher.container=bash -c 'echo $SLURM_PROCID $(hostname)' say", f"run={tmp_path / 'run'}")
    job = submitted(*RUN, "mesh.tp=2", "mesh.ring=2", "nodes=2", "steps=1", "time=30", *words)
    job.ends()
    told = [(job.run / "ranks" / f"{rank}.log").read_text().split() for rank in range(4)]
    assert told == [["0", "n1"], ["1", "n1"], ["2", "n2"], ["3", "n2"]]
