"""Checks of a one-shot generation: figures of its logits."""

import pytest
import torch

from longctx.infer.generate import finite_figure
from longctx.megatron.model import rows_of_logits


def test_logits_that_are_not_finite_give_no_figure():
    assert finite_figure(torch.tensor(0.5)) == 0.5
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits cannot be compared, since some are NaN or infinite"):
            finite_figure(torch.tensor(bad))


@pytest.mark.parametrize(("vocab_size", "rows"), [(49152, 254), (262_144, 47), (1, 12_500_000), (99_999_999, 1)])
def test_logits_in_memory_take_50_mb_for_any_vocabulary(vocab_size, rows):
    assert rows_of_logits(vocab_size) == rows
