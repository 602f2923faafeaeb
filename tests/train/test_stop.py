"""One rank is asked to stop, and all of them agree at the same step."""

import pytest

from longctx.parallel.launch import run_ranks
from tests.train.stop_ranks import asked


@pytest.mark.parametrize(("ranks", "whom"), [(3, 1), (1, 0)])
def test_all_ranks_hear_of_it_at_the_same_step(ranks, whom):
    assert run_ranks(ranks, asked, whom) == [(False, True, True)] * ranks
