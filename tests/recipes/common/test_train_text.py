"""A fault of one rank's text, and a request to stop, end all ranks after the same step."""

import itertools
import os
import signal

import pytest

from longctx.parallel.launch import Rank, RankFailed, run_ranks
from recipes import pretrain
from recipes.common import train_text
from recipes.common.cli import compose_config
from recipes.common.train_job import TrainJob
from recipes.common.train_loop import run_rank
from recipes.common.train_report import RunResult
from recipes.common.train_resume import begin_run


@pytest.fixture
def begun(tmp_path):
    """``begun(*settings)``: the job of a new run of the tiny model in tmp_path."""

    def begin(*settings: str) -> TrainJob:
        words = ["experiment=pretrain/tiny", f"out={tmp_path}", "data.length=61", "data.batch=2", "run.threads=1"]
        job = pretrain.prepare(compose_config("pretrain", [*words, "evaluate.every=0", *settings]))
        begin_run(job)
        return job

    return begin


def read_until_a_fault(rank: Rank, job: TrainJob) -> RunResult:
    """Train; on rank 1 alone, the text cannot be read after two batches, as if its connection broke."""
    batches = train_text._batches

    def broken(*args: object):
        yield from itertools.islice(batches(*args), 2)
        raise ValueError("row 7 cannot be read: repair it, or set data.on_error=skip")

    if rank.rank == 1:
        train_text._batches = broken
    return run_rank(rank, job)


def test_fault_of_one_rank_s_text_ends_all_ranks_and_saves_their_steps(begun, tmp_path):
    job = begun("mesh.ring=2")
    with pytest.raises(RankFailed, match=r"row 7 cannot .*; the 2 steps before it are saved; a run that goes on takes"):
        run_ranks(2, read_until_a_fault, job)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def asked_in_the_last_step(rank: Rank, job: TrainJob) -> RunResult:
    """Train for one step; the request to stop arrives when its batch is read."""
    batches = train_text._batches

    def signalled(*args: object):
        os.kill(os.getpid(), signal.SIGUSR1)
        yield from batches(*args)

    train_text._batches = signalled
    return run_rank(rank, job)


def test_run_that_is_asked_to_stop_in_its_last_step_has_ended_by_itself(begun):
    """Slurm would requeue a job that was stopped."""
    (result,) = run_ranks(1, asked_in_the_last_step, begun("steps=1"))
    assert (result.step, result.stopped) == (1, False)
