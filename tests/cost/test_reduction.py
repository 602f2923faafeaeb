"""All-reduce costs against published ratios and a simulated ring."""

import pytest

from longctx.cost.reduction import all_reduce_seconds, communication_saved, spd_forward_seconds


def test_dropping_in_all_blocks_saves_half_of_the_communication() -> None:
    """arXiv 2502.20727: at most 50 %; with 100 % dropped its Figure 2 shows more than 46 % in all four systems."""
    assert communication_saved(1) == 0.5 and communication_saved(0.7) == pytest.approx(0.35)


def test_published_speed_up_follows_from_share_of_communication() -> None:
    """LLaMA2-70B with 70 % of 80 blocks dropped: 19.7 % if all 160 all-reduces take 56 % of the time."""
    assert 1 - spd_forward_seconds(1.0, 80, 0.7, 0.5629 / 160) == pytest.approx(0.197, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_all_reduce_equals_ring_reduce_scatter_and_all_gather(ranks: int) -> None:
    hop, rate, size = 3e-4, 1e7, 2.1e6
    seconds = 0.0
    for _ in ("scatter", "gather"):
        for _ in range(ranks - 1):  # every rank sends 1/n to the next, all at the same time
            seconds += hop + size / ranks / rate
    assert all_reduce_seconds(size, ranks, hop, rate) == pytest.approx(seconds)
