"""The ranks' part of an evaluation: refusals that only the weights can cause."""

import math

import pytest

from eval.answers.worker import EvalWork, refuse_nan


def test_nan_log_probability_is_refused(prepared, tmp_path):
    work = EvalWork("a", prepared("eval.limit=1").variants[0], (), tmp_path, 1)
    refuse_nan(work, [-1.5, -math.inf])
    with pytest.raises(ValueError, match=r"variant baseline: 1 of 2 log-probabilities are not a number.*model.dtype"):
        refuse_nan(work, [-1.5, math.nan])
