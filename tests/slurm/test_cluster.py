"""Slurm's own commands, stood in for by scripts: partitions that fit a job, and output that is no text."""

import os
from dataclasses import replace
from functools import cache

import pytest

from slurm import cluster, submit
from slurm.plan import JobPlan
from tests.slurm.conftest import TINY


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(name, line)`` puts a shell script of one ``line`` on PATH."""

    def install(name: str, line: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


@cache
def plan_on_two_nodes() -> JobPlan:
    (plan,) = submit.make_plans([*TINY, "mesh.ring=2", "nodes=2", "folder=/run", "dry_run=true"])
    return plan


def on(partition: str | None) -> JobPlan:
    plan = plan_on_two_nodes()
    return replace(plan, launcher=replace(plan.launcher, partition=partition))


@pytest.mark.parametrize("partition", ["small,large", "large, small", "large", None])
def test_one_of_several_partitions_must_fit(program, partition):
    """Slurm takes the first that can run the job."""
    program("sinfo", "echo 'small|1|4|(null)'; echo 'large*|3|4|(null)'")
    cluster.refuse_unfit_cluster(on(partition))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ("small,tiny", "partition small is too small for nodes=2: it has 1 nodes"),
        ("small", "partition small is too small for nodes=2"),
        ("large,none", "launcher.partition=none: the cluster has no such partition; use one of small, tiny, large"),
    ],
)
def test_partitions_of_which_none_fits_are_refused(program, partition, message):
    program("sinfo", "echo 'small|1|4|(null)'; echo 'tiny|1|1|(null)'; echo 'large*|3|4|(null)'")
    with pytest.raises(ValueError, match=message):
        cluster.refuse_unfit_cluster(on(partition))


def test_name_of_a_job_that_squeue_cuts_inside_a_character_is_read(program):
    program("squeue", "printf '12 main entra\\303 root R'")
    assert cluster.is_active(12)
