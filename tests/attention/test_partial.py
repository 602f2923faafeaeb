"""Partial attentions add up: `merge` is the whole of ring, pass-Q, chunked and cached attention."""

import math
from functools import reduce

import pytest
import torch

from longctx.attention.partial import Partial, accumulation_dtype, empty_partial, merge, merge_
from tests import oracle

B, S, HQ, HK, D = 2, 5, 6, 3, 7
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def same(a: Partial, b: Partial, tolerance: float) -> None:
    oracle.assert_close(a.out, b.out.double(), tolerance)
    seen = b.lse > -math.inf
    assert torch.equal(a.lse > -math.inf, seen)
    oracle.assert_close(a.lse[seen], b.lse[seen].double(), tolerance)


def some_keys(q, k, v, keys: slice) -> Partial:
    k, v = k[:, keys], v[:, keys]
    out, lse = oracle.attention(q, k, v, torch.ones(S, k.shape[1], dtype=torch.bool))
    return Partial(out.to(q.dtype), lse.to(q.dtype))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def thirds(request) -> list[Partial]:
    """The same queries over all of 11 keys, and over the first 2, the next 1 and the last 8 of them."""
    torch.manual_seed(0)
    q = torch.randn(B, S, HQ, D, dtype=request.param)
    k, v = (torch.randn(B, 11, HK, D, dtype=request.param) for _ in range(2))
    return [some_keys(q, k, v, keys) for keys in (slice(11), slice(2), slice(2, 3), slice(3, 11))]


def test_merge_is_the_softmax_over_all_keys(thirds):
    whole, *parts = thirds
    same(reduce(merge, parts), whole, TOLERANCE[whole.out.dtype])


def test_merge_is_associative_and_commutative(thirds):
    _, a, b, c = thirds
    tolerance = TOLERANCE[a.out.dtype]
    same(merge(merge(a, b), c), merge(a, merge(b, c)), tolerance)
    same(merge(a, b), merge(b, a), tolerance)


def test_nothing_is_the_unit_of_merge(thirds):
    a = thirds[0]
    for merged in (merge(a, empty_partial(a.out)), merge(empty_partial(a.out), a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


def test_rows_that_one_side_or_none_has_seen_have_no_nan(thirds):
    """Row 0 is seen by neither, row 1 by a, row 2 by b: -inf minus -inf must not appear."""
    _, a, b, _ = thirds
    for part, unseen in ((a, [0, 2]), (b, [0, 1])):
        part.out[:, unseen] = 0
        part.lse[:, unseen] = -math.inf
    merged = merge(a, b)
    assert torch.equal(merged.out[:, :3], torch.stack([a.out[:, 0], a.out[:, 1], b.out[:, 2]], 1))
    assert torch.equal(merged.lse[:, :3], torch.stack([a.lse[:, 0], a.lse[:, 1], b.lse[:, 2]], 1))
    assert torch.isfinite(merged.lse[:, 3:]).all()


@pytest.mark.parametrize("level", [-5000.0, -100.0, 100.0, 5000.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, 200.0])
def test_scores_whose_exponential_overflows_float32(level, gap):
    """exp(88.8) is inf in float32, exp(-104) is 0; only the difference of two log-sum-exps may matter."""
    torch.manual_seed(0)
    a, b = (Partial(torch.randn(B, S, HQ, D), torch.full((B, S, HQ), x)) for x in (level, level - gap))
    share = 1 / (1 + math.exp(gap))
    out = (1 - share) * a.out.double() + share * b.out.double()
    lse = torch.full((B, S, HQ), level + math.log1p(math.exp(-gap)), dtype=torch.float64)
    same(merge(a, b), Partial(out, lse), 1e-6)


def test_absorb_is_merge_on_some_rows(thirds):
    _, a, b, _ = thirds
    rows = slice(1, 4)
    part = Partial(b.out[:, rows], b.lse[:, rows])
    expected = merge(Partial(a.out[:, rows], a.lse[:, rows]), part)
    seen = Partial(a.out.clone(), a.lse.clone())
    merge_(seen, rows, part)
    assert torch.equal(seen.out, torch.cat([a.out[:, :1], expected.out, a.out[:, 4:]], 1))
    assert torch.equal(seen.lse, torch.cat([a.lse[:, :1], expected.lse, a.lse[:, 4:]], 1))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_softmax_state_is_kept_in_float32_or_better(given, kept):
    q = torch.zeros(B, S, HQ, D, dtype=given)
    start = empty_partial(q)
    assert accumulation_dtype(q) == start.out.dtype == start.lse.dtype == kept
    assert start.out.shape == q.shape
    assert (start.lse == -math.inf).all()
    assert start.lse.shape == (B, S, HQ)
