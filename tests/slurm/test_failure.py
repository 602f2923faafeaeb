"""Who is blamed for a job's failure: the killed before those who missed it, then whoever ended first."""

import pytest

from slurm.failure import report


@pytest.fixture
def ended(tmp_path):
    (tmp_path / "ranks").mkdir()

    def write(rank: int, at: float, host: str, code: int, log: str) -> None:
        (tmp_path / "ranks" / f"{rank}.end").write_text(f"{at} {host} {code}\n")
        (tmp_path / "ranks" / f"{rank}.log").write_text(log)

    return write


def test_a_killed_rank_comes_before_those_who_missed_it(ended, tmp_path):
    ended(0, 100.0, "n1", 1, "LostPeer: lost rank 3\n\nSet the environment variable HYDRA_FULL_ERROR=1\n")
    ended(3, 100.25, "n2", 137, "step 1\nstep 2\n\n")
    lines = report(tmp_path, 143).splitlines()
    assert lines[0] == f"rank 3 on n2 was killed by SIGKILL; its last lines, of {tmp_path}/ranks/3.log:"
    assert lines[1:] == ["  step 1", "  step 2", "-0.2 s: rank 0 on n1 exited with 1: LostPeer: lost rank 3"]


def test_then_whoever_ended_first(ended, tmp_path):
    ended(11, 102.0, "n2", 1, "lost rank 2\n")
    ended(2, 100.0, "n1", 1, "\n".join(f"line {i}" for i in range(100)))
    told = report(tmp_path, 1)
    assert told.startswith("rank 2 on n1 exited with 1;") and "+2.0 s: rank 11 on n2 exited with 1: lost rank 2" in told
    assert "  line 70\n" in told and "line 69" not in told


def test_a_code_that_is_no_signal_s_was_no_kill(ended, tmp_path):
    """255 is a container that could not start; others' absence is missed later."""
    ended(0, 100.0, "n1", 255, "FATAL: could not open image\n")
    ended(1, 101.0, "n1", 137, "step 1\n")
    told = report(tmp_path, 255)
    assert told.startswith("rank 1 on n1 was killed by SIGKILL;") and "rank 0 on n1 exited with 255: " in told


def test_who_was_only_ended_with_the_others_comes_last(ended, tmp_path):
    ended(0, 100.0, "n1", 143, "Terminated\n")
    ended(1, 100.5, "n1", 1, "ValueError\n")
    assert report(tmp_path, 143).startswith("rank 1 on n1 exited with 1;")


def test_where_no_rank_left_word_slurm_speaks(tmp_path):
    (tmp_path / "srun.log").write_text("srun: error: Node failure on n2\n")
    assert report(tmp_path, 143) == (
        "the job ended with 143, and no rank left word; Slurm said:\n  srun: error: Node failure on n2"
    )
