"""One rank receives the stop signal, and all ranks agree to stop at the same step."""

import subprocess
import sys

import pytest

from longctx.parallel.launch import run_ranks
from tests.train.stop_ranks import agreements, faults


@pytest.mark.parametrize(("ranks", "signaled"), [(3, 1), (1, 0)])
def test_all_ranks_agree_at_the_same_step(ranks, signaled):
    assert run_ranks(ranks, agreements, signaled) == [(False, True, True)] * ranks


def test_all_ranks_learn_of_a_fault_of_one():
    assert run_ranks(3, faults, 2) == [(True, False, True)] * 3


ENDS = """
import os, sys
from longctx.train.stop import SIGNAL, StopRequest
class Last:
    def __del__(self, kill=os.kill, me=os.getpid(), signal=SIGNAL):
        kill(me, signal)  # after Python has restored the default handlers
stop = StopRequest()
sys.stop_test = Last()
if sys.argv[1] == "over":
    stop.over()
"""


@pytest.mark.parametrize(("mode", "code"), [("over", 0), ("listens", -10)])
def test_signal_during_exit_kills_unless_ignored(mode, code):
    """Slurm's script repeats the signal; without `over` it kills the process at exit."""
    assert subprocess.run([sys.executable, "-c", ENDS, mode], check=False).returncode == code
