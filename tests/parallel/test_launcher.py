"""The rank is the one that torchrun or srun assigned, or the environment is refused."""

import pytest

from longctx.parallel import launcher
from longctx.parallel.launch import Rank
from longctx.parallel.launcher import current_rank, rank_from_environment

ADDRESS = {"MASTER_ADDR": "n17", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", **ADDRESS}
SRUN = {
    "SLURM_JOB_ID": "41003", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n17",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
}  # fmt: skip


def test_no_launcher_gives_no_rank():
    assert rank_from_environment({}) is None
    assert rank_from_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None, "a batch script, not a step"


@pytest.mark.parametrize("one_process", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_launcher_of_a_single_process_gives_no_rank(one_process):
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n17", **one_process}) is None


@pytest.mark.parametrize("tasks", ["1", "2"])
def test_torchrun_inside_srun_assigns_the_rank(tasks):
    srun = {**SRUN, "SLURM_STEP_NUM_TASKS": tasks}
    assert rank_from_environment({**srun, **TORCHRUN, "TORCHELASTIC_RUN_ID": "7"}) == Rank(5, 8, 5, 8, "env://")
    assert rank_from_environment({**srun, **TORCHRUN}) == Rank(5, 8, 5, 8, "env://"), "set by hand in the job"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "7"}
    assert rank_from_environment({**srun, **alone}) is None


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}])
def test_variables_that_were_left_in_the_environment_do_not_hide_srun_s(monkeypatch, left):
    monkeypatch.setattr(launcher, "_first_host", str)
    assert rank_from_environment({**SRUN, **left}) == Rank(0, 2, 0, 2, "tcp://n17:25003")
    assert rank_from_environment({**SRUN, **left, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_rank_from_torchrun():
    torchrun = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", **ADDRESS}
    assert rank_from_environment(torchrun) == Rank(5, 7, 1, 3, "env://")
    assert rank_from_environment({"RANK": "5", "WORLD_SIZE": "7", **ADDRESS}) == Rank(5, 7, 0, 1, "env://")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK set, WORLD_SIZE is not; start with torchrun, or unset RANK to"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set, RANK is not; start with torchrun, or unset WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not; .* unset RANK and WORLD_SIZE to"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n17"}, "MASTER_PORT is not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "n17", "MASTER_PORT": "7"}, "RANK=x is not a number"),
        (
            {"SLURM_STEP_NODELIST": "n17", "SLURM_PROCID": "0"},
            "srun's variables are incomplete or wrong: .* set, SLURM_STEP_NUM_TASKS is not",
        ),
    ],
)
def test_half_of_a_launcher_s_environment_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        rank_from_environment(environment)


def test_address_alone_is_no_launcher_s_environment():
    assert rank_from_environment(ADDRESS) is None


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "local_world_size"),
    [("2(x3)", 2, 2), ("3,3", 1, 3), ("6", 0, 6), ("2(x2),1,3", 2, 1), ("2(x2),1,3", 3, 3)],
)
def test_rank_from_srun(tasks_per_node, node, local_world_size):
    srun = {
        "SLURM_JOB_ID": "41003",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NODELIST": "n[17-19]",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }
    assert rank_from_environment(srun) == Rank(5, 6, 1, local_world_size, "tcp://n17:25003")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n5", "n5"), ("n5,n7", "n5"), ("n[05-07,9]", "n05"), ("n[3,5],m1", "n3"), ("a[2-3]b[07-09]-ib,c", "a2b07-ib"),
     ("gpu-1,gpu-[2-4]", "gpu-1")],
)  # fmt: skip
def test_first_host_of_a_list_of_nodes(nodes, first):
    assert launcher._first_host(nodes) == first


def test_steps_and_restarts_of_a_job_use_other_ports():
    ports = [
        launcher._port(job, step, restarts) for job in range(41003, 41013) for step in range(5) for restarts in range(5)
    ]
    assert len(set(ports)) == 250 and min(ports) >= 20000 and max(ports) < 32768


def test_current_rank_reads_the_environment_once(monkeypatch):
    calls = []
    monkeypatch.setattr(launcher, "rank_from_environment", lambda environment: calls.append(environment["RANK"]))
    monkeypatch.setenv("RANK", "5")
    current_rank.cache_clear()
    try:
        assert [current_rank(), current_rank()] == [None, None]
        assert calls == ["5"]
        current_rank.cache_clear()
        current_rank()
        assert calls == ["5", "5"]
    finally:
        current_rank.cache_clear()
