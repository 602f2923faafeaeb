"""The ranks' part of an evaluation: refusals that only the weights can cause."""

import math

import pytest

from eval.answers.worker import EvalWork, refuse_not_finite


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_log_probability_that_is_not_finite_is_refused(prepared, tmp_path, bad):
    work = EvalWork("a", prepared("eval.limit=1").variants[0], (), tmp_path, 1)
    refuse_not_finite(work, [-1.5, -1e9])
    with pytest.raises(ValueError, match=r"variant baseline: 1 of 2 log-probabilities are NaN or infin.*model.dtype"):
        refuse_not_finite(work, [-1.5, bad])
