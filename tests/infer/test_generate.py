"""Checks of a one-shot generation: figures of its logits."""

import pytest
import torch

from longctx.infer.generate import finite_figure


def test_logits_that_are_not_finite_give_no_figure():
    assert finite_figure(torch.tensor(0.5)) == 0.5
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits cannot be compared, since some are NaN or infinite"):
            finite_figure(torch.tensor(bad))
