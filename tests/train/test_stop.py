"""One rank is asked to stop, and all of them agree at the same step."""

import subprocess
import sys

import pytest

from longctx.parallel.launch import run_ranks
from tests.train.stop_ranks import asked


@pytest.mark.parametrize(("ranks", "whom"), [(3, 1), (1, 0)])
def test_all_ranks_hear_of_it_at_the_same_step(ranks, whom):
    assert run_ranks(ranks, asked, whom) == [(False, True, True)] * ranks


ENDS = """
import os, sys
from longctx.train.stop import SIGNAL, StopRequest
class Last:
    def __del__(self, kill=os.kill, me=os.getpid(), signal=SIGNAL):
        kill(me, signal)  # when Python has given its own handlers back
stop = StopRequest()
sys.stop_test = Last()
if sys.argv[1] == "over":
    stop.over()
"""


@pytest.mark.parametrize(("says", "code"), [("over", 0), ("listens", -10)])
def test_who_is_asked_again_while_python_ends_is_not_killed(says, code):
    """Slurm's script asks again and again; without `over` the signal kills."""
    assert subprocess.run([sys.executable, "-c", ENDS, says], check=False).returncode == code
