"""Seconds of reductions: against published ratios, and a simulated ring."""

import pytest

from longctx.cost.reduction import all_reduce_seconds, communication_saved, with_dropped


def test_all_blocks_dropped_save_half_of_the_communication() -> None:
    """arXiv 2502.20727: at most 50 %; with 100 % dropped its Figure 2 shows more than 46 % in all four systems."""
    assert communication_saved(1) == 0.5 and communication_saved(0.7) == pytest.approx(0.35)


def test_the_paper_s_speed_up_follows_from_its_share_of_communication() -> None:
    """LLaMA2-70B, 70 % of 80 blocks: 19.7 % where all 160 all-reduces are 56 % of the time."""
    assert 1 - with_dropped(1.0, 80, 0.7, 0.5629 / 160) == pytest.approx(0.197, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_an_all_reduce_is_a_ring_of_scatter_and_gather(ranks: int) -> None:
    hop, rate, size = 3e-4, 1e7, 2.1e6
    seconds = 0.0
    for _ in ("scatter", "gather"):
        for _ in range(ranks - 1):  # every rank sends an n-th to the next one, all at once
            seconds += hop + size / ranks / rate
    assert all_reduce_seconds(size, ranks, hop, rate) == pytest.approx(seconds)
