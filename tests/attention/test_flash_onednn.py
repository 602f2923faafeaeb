"""Attention by oneDNN's products equals dense float64, also over several blocks, and in rows that lose their scores."""

import math

import pytest
import torch

from longctx import onednn
from longctx.attention import flash_cpu, flash_onednn
from longctx.attention.kernel import reference
from tests import oracle


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Take oneDNN whatever this CPU is, with blocks of few rows and keys."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(flash_onednn, "_ROWS", 23)
    monkeypatch.setattr(flash_onednn, "_KEYS", 17)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 5)], ids=str)
@pytest.mark.parametrize(
    ("sq", "sk", "causal"),
    [(131, 67, False), (3, 101, False), (1, 1, True), (7, 7, True), (18, 18, True), (131, 131, True)],
)
def test_output_and_log_sum_exp_equal_float64(sq, sk, causal, heads):
    hq, hk = heads
    q, k, v = torch.randn(2, sq, hq, 11), torch.randn(2, sk, 2 * hk, 11)[:, :, ::2], torch.randn(2, sk, hk, 11)
    part = flash_onednn.forward(q, k, v, causal)
    mask = torch.ones(sq, sk, dtype=torch.bool).tril() if causal else torch.ones(sq, sk, dtype=torch.bool)
    out, lse = oracle.attention(q, k, v, mask)
    oracle.assert_close(part.out, out, 2e-6)
    oracle.assert_close(part.lse, lse, 2e-6)
    # The tile's share of the gradients, if other keys take some of the weight: lse is that of all keys.
    dout, all_lse = torch.randn(2, hq, sq, 11).transpose(1, 2), lse + torch.rand(lse.shape)
    grads = flash_onednn.backward(dout, q, k, v, part.out, all_lse.float(), causal)
    expected = reference.backward(*(x.double() for x in (dout, q, k, v, part.out, all_lse)), causal)
    for got, exact in zip(grads, expected, strict=True):
        oracle.assert_close(got, exact, 3e-6)


@pytest.mark.parametrize(("sq", "causal"), [(131, True), (131, False), (18, True)])
def test_gradients_equal_those_of_autograd_in_float64(sq, causal):
    q, k, v, dout = (torch.randn(2, sq, heads, 11) for heads in (6, 2, 2, 6))
    mask = torch.ones(sq, sq, dtype=torch.bool).tril() if causal else torch.ones(sq, sq, dtype=torch.bool)
    part = flash_onednn.forward(q, k, v, causal)
    grads = flash_onednn.backward(dout, q, k, v, part.out, part.lse, causal)
    for got, exact in zip(grads, oracle.gradients(q, k, v, mask, dout), strict=True):
        oracle.assert_close(got, exact, 3e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_finite_score_are_nan_and_blocks_without_one_have_no_weight(causal):
    """Keys 17 to 33, a whole block, overflow to -inf for rows 40 and later; for the last row, all keys do."""
    q, k, v = (torch.randn(1, 67, 1, 11).abs() for _ in range(3))
    k[:, 17:34] *= -1e30
    q[:, 40:] *= 1e10
    k[:, :, 0, 0], q[:, 66, 0, 0] = -1e20, 1e30
    q[:, :66, 0, 0] = 0
    part, expected = (
        flash_onednn.forward(q, k, v, causal),
        reference.forward(q.double(), k.double(), v.double(), causal),
    )
    assert part.out[:, 66].isnan().all() and part.lse[:, 66].isnan().all()
    oracle.assert_close(part.out[:, :66], expected.out[:, :66], 2e-6)
    oracle.assert_close(part.lse[:, :66] / 1e10, expected.lse[:, :66] / 1e10, 2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lost_inputs_are_not_hidden(bad):
    q, k, v = (torch.randn(1, 67, 2, 11) for _ in range(3))
    q[0, 5, 1, 3] = bad
    part = flash_onednn.forward(q, k, v, causal=True)
    lost = part.lse.isnan()
    assert lost[0, 5, 1] and lost.sum() == 1 and part.out[0, 5, 1].isnan().all() and part.out[0, 5, 0].isfinite().all()


@pytest.mark.parametrize(
    ("rows", "keys", "causal", "dtype", "faster", "threads", "expected"),
    [
        (43, 256, False, torch.float32, True, 1, True),
        (43, 256, False, torch.float32, True, 2, False),
        (512, 512, True, torch.float32, True, 1, True),
        (511, 511, True, torch.float32, True, 1, False),
        (42, 256, False, torch.float32, True, 1, False),
        (43, 255, False, torch.float32, True, 1, False),
        (43, 256, False, torch.float64, True, 1, False),
        (43, 256, False, torch.bfloat16, True, 1, True),
        (43, 256, False, torch.float32, False, 1, False),
    ],
)
def test_large_float32_tiles_take_it_on_cpus_where_it_is_faster(
    monkeypatch, rows, keys, causal, dtype, faster, threads, expected
):
    monkeypatch.setattr(onednn, "is_faster", lambda: faster)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen, forward = [], flash_onednn.forward
    monkeypatch.setattr(flash_onednn, "forward", lambda *args: seen.append(args) or forward(*args))
    q, k, v = (torch.randn(1, n, heads, 8, dtype=dtype) for n, heads in ((rows, 6), (keys, 2), (keys, 2)))
    part = flash_cpu.flash_cpu.forward(q, k, v, causal)
    assert bool(seen) == expected
    mask = torch.ones(rows, keys, dtype=torch.bool)
    assert part.out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle.assert_close(part.out, oracle.attention(q, k, v, mask.tril() if causal else mask)[0], 2e-6)
