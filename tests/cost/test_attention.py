"""Attention costs against published figures (arXiv 2411.01783, Tables 4 and 5) and explicit sums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.cost.attention import COSTS, Work, block_seconds, pass_kv_cost, pass_q_cost
from tests.cost.table4 import ACHIEVED, gpu, work


@pytest.mark.parametrize(("t", "q_mb", "partials_mb"), [(3200, 3.28, 9.83), (12800, 13.11, 39.3)])
def test_message_sizes_of_405b(t, q_mb, partials_mb):
    one = work(t, 128000 - t)
    assert one.kv_block_bytes == pytest.approx(16.38e6, rel=1e-3)
    assert one.q_block_bytes == pytest.approx(q_mb * 1e6, rel=2e-3)
    # The paper sends partial outputs in 16 bits.  We send 32 bits, and one log-sum-exp per head.
    assert one.partial_bytes == pytest.approx(2 * partials_mb * 1e6 * 129 / 128, rel=2e-3)


@pytest.mark.parametrize(("t", "microseconds"), [(3200, 414), (12800, 1608)])
def test_block_seconds_of_table_5(t, microseconds):
    # 2 % to 7 % of the pairs are masked, of which a kernel saves only a part.
    assert block_seconds(work(t, 128000 - t), ACHIEVED) == pytest.approx(microseconds * 1e-6, rel=0.07)


def test_send_receive_seconds_of_table_5():
    assert ACHIEVED.hop.seconds(work(3200, 124800).kv_block_bytes) == pytest.approx(627e-6, rel=0.02)


def test_difference_of_strategies_at_miss_rate_of_ten_percent():
    """Table 4: 124.6 ms over 126 layers.  Its partial outputs are 16-bit; Table 5 implies 38.4 GB/s for them."""
    one = work(12800, 115200)
    hardware = gpu(515, 26, exchange_gigabytes=38.4 * 2)
    difference = 126 * (pass_q_cost(one, hardware).seconds - pass_kv_cost(one, hardware).seconds)
    assert difference == pytest.approx(0.1246, rel=0.06)


@pytest.mark.parametrize(
    ("t", "p", "window"), [(7, 11, None), (7, 11, 3), (7, 11, 13), (23, 0, 5), (1, 0, 1), (5, 2, 99)]
)
def test_flops_count_the_pairs_of_the_mask(t, p, window):
    one = Work((t, 3), (p, 0), 2, heads=6, kv_heads=2, head_dim=5, element_bytes=4, window=window)
    pairs = sum(min(window or 999, position + 1) for t, p in ((t, p), (3, 0)) for position in range(p, p + t))
    assert one.flops == 4 * 5 * 6 * pairs


few = st.lists(st.tuples(st.integers(1, 97), st.integers(0, 97)), min_size=1, max_size=3)


@given(few, st.integers(2, 7), st.sampled_from([(9, 3), (8, 1), (5, 5)]))
def test_bytes_sent_match_even_shares(sequences, ranks, heads):
    new, cached = zip(*sequences, strict=True)
    one = Work(new, cached, ranks, *heads, head_dim=11, element_bytes=2)
    keys = sum(2 * (t + p) * heads[1] * 11 * 2 for t, p in sequences) / ranks
    queries = sum(t * heads[0] for t in new) / ranks
    sent = {name: cost(one, ACHIEVED).bytes_sent for name, cost in COSTS.items()}
    assert sent["pass_kv"] == sent["all_gather_kv"] == pytest.approx((ranks - 1) * keys)
    assert sent["pass_q"] == pytest.approx((ranks - 1) * queries * (11 * 2 + 12 * 4))


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 9))
def test_more_cached_tokens_cost_more(t, p, ranks):
    for cost in COSTS.values():
        less, more = (cost(work(t, cached, ranks), ACHIEVED) for cached in (p, p + 1000))
        assert less.seconds < more.seconds
        assert less.exposed_s >= -1e-12
