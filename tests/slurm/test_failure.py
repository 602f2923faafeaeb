"""The order of blame in failure.txt: killed ranks, then failed ones, then those that srun ended; earlier ones first."""

import pytest

from slurm.failure import report


@pytest.fixture
def add_exit(tmp_path):
    """``add_exit(rank, at, host, code, log)`` writes the files that a failed rank leaves."""
    (tmp_path / "ranks").mkdir()

    def write(rank: int, at: float, host: str, code: int, log: str) -> None:
        (tmp_path / "ranks" / f"{rank}.end").write_text(f"{at} {host} {code}\n")
        (tmp_path / "ranks" / f"{rank}.log").write_text(log)

    return write


def test_file_that_a_full_disk_left_empty_is_left_out(add_exit, tmp_path):
    add_exit(1, 5.0, "b", 1, "why")
    (tmp_path / "ranks" / "0.end").touch()
    assert report(tmp_path, 1).startswith("rank 1 on b exited with 1")


def test_killed_rank_comes_before_ranks_that_lost_it(add_exit, tmp_path):
    add_exit(0, 100.0, "n1", 1, "LostPeer: lost rank 3\n\nSet the environment variable HYDRA_FULL_ERROR=1\n")
    add_exit(3, 100.25, "n2", 137, "step 1\nstep 2\n\n")
    lines = report(tmp_path, 143).splitlines()
    assert lines[0] == f"rank 3 on n2 was killed by SIGKILL; last lines of {tmp_path}/ranks/3.log:"
    assert lines[1:] == ["  step 1", "  step 2", "-0.2 s: rank 0 on n1 exited with 1: LostPeer: lost rank 3"]


def test_earlier_failure_comes_first(add_exit, tmp_path):
    add_exit(11, 102.0, "n2", 1, "lost rank 2\n")
    add_exit(2, 100.0, "n1", 1, "\n".join(f"line {i}" for i in range(100)))
    text = report(tmp_path, 1)
    assert text.startswith("rank 2 on n1 exited with 1;") and "+2.0 s: rank 11 on n2 exited with 1: lost rank 2" in text
    assert "  line 70\n" in text and "line 69" not in text


def test_code_255_does_not_count_as_killed(add_exit, tmp_path):
    """A container that cannot start exits with 255, which is above 128 and no signal."""
    add_exit(0, 100.0, "n1", 255, "FATAL: could not open image\n")
    add_exit(1, 101.0, "n1", 137, "step 1\n")
    text = report(tmp_path, 255)
    assert text.startswith("rank 1 on n1 was killed by SIGKILL;") and "rank 0 on n1 exited with 255: " in text


def test_rank_ended_by_srun_comes_last(add_exit, tmp_path):
    add_exit(0, 100.0, "n1", 143, "Terminated\n")
    add_exit(1, 100.5, "n1", 1, "ValueError\n")
    assert report(tmp_path, 143).startswith("rank 1 on n1 exited with 1;")


def test_without_recorded_exits_the_report_has_slurm_output(tmp_path):
    (tmp_path / "srun.log").write_text("srun: error: Node failure on n2\n")
    first, *others = report(tmp_path, 143).splitlines()
    assert first.startswith("the job exited with 143, and no rank recorded")
    assert others == ["  srun: error: Node failure on n2"]
