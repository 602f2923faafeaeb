"""All-reduce costs against published ratios and a simulated ring."""

import pytest

from longctx.cost.reduction import all_reduce_seconds, message_bytes, reduction_seconds, spd_reducing_seconds


def test_dropping_in_all_blocks_saves_half_of_the_communication() -> None:
    """arXiv 2502.20727: at most 50 %; with 100 % dropped its Figure 2 shows more than 46 % in all four systems."""
    reducing = {share: spd_reducing_seconds(80, share, 2.0, 2.0) for share in (0, 0.7, 1)}
    assert reducing[1] == reducing[0] / 2 and reducing[0.7] == pytest.approx(0.65 * reducing[0])


def test_published_speed_up_follows_from_share_of_communication() -> None:
    """LLaMA2-70B with 70 % of 80 blocks dropped: 19.7 % if all 160 all-reduces take 56 % of the time."""
    seconds = 0.5629 / 160
    saved = spd_reducing_seconds(80, 0, seconds, seconds) - spd_reducing_seconds(80, 0.7, seconds, seconds)
    assert saved == pytest.approx(0.197, abs=1e-4)


def test_reduction_takes_the_bytes_and_hops_of_its_dtype() -> None:
    """61 values in groups of 20 are 4 groups a row.  One rank of three sends two messages of a third in each step."""
    sizes = {"float32": 7 * 61 * 4, "bfloat16": 7 * 61 * 2, "int8": 7 * 4 * (2 + 20), "int6": 7 * 4 * (2 + 15)}
    assert {dtype: message_bytes(7, 61, dtype, 20) for dtype in sizes} == sizes
    hop, rate = 3e-4, 1e7
    for dtype, size in sizes.items():
        hops = 4 if dtype == "float32" else 2
        expected = hops * hop + 4 * size / 3 / rate
        assert reduction_seconds(7, 61, 3, hop, rate, dtype, 20) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_all_reduce_equals_ring_reduce_scatter_and_all_gather(ranks: int) -> None:
    hop, rate, size = 3e-4, 1e7, 2.1e6
    seconds = 0.0
    for _ in ("scatter", "gather"):
        for _ in range(ranks - 1):  # every rank sends 1/n to the next, all at the same time
            seconds += hop + size / ranks / rate
    assert all_reduce_seconds(size, ranks, hop, rate) == pytest.approx(seconds)
