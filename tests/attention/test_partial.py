"""Partial attentions: merging those of all subsets of the keys gives the attention over all keys."""

import math
from functools import reduce

import pytest
import torch

from longctx.attention.partial import Partial, accumulation_dtype, empty_partial, merge, merge_
from tests import oracle

B, S, HQ, HK, D = 2, 5, 6, 3, 7
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def assert_same(a: Partial, b: Partial, tolerance: float) -> None:
    oracle.assert_close(a.out, b.out.double(), tolerance)
    seen = b.lse > -math.inf
    assert torch.equal(a.lse > -math.inf, seen)
    oracle.assert_close(a.lse[seen], b.lse[seen].double(), tolerance)


def attend(q, k, v, keys: slice) -> Partial:
    """Return the attention of ``q`` over a slice of the keys."""
    k, v = k[:, keys], v[:, keys]
    out, lse = oracle.attention(q, k, v, torch.ones(S, k.shape[1], dtype=torch.bool))
    return Partial(out.to(q.dtype), lse.to(q.dtype))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def thirds(request) -> list[Partial]:
    """The attention of the same queries over all 11 keys, the first 2, the next 1 and the last 8."""
    torch.manual_seed(0)
    q = torch.randn(B, S, HQ, D, dtype=request.param)
    k, v = (torch.randn(B, 11, HK, D, dtype=request.param) for _ in range(2))
    return [attend(q, k, v, keys) for keys in (slice(11), slice(2), slice(2, 3), slice(3, 11))]


def test_merge_is_the_softmax_over_all_keys(thirds):
    whole, *parts = thirds
    assert_same(reduce(merge, parts), whole, TOLERANCE[whole.out.dtype])


def test_merge_is_associative_and_commutative(thirds):
    _, a, b, c = thirds
    tolerance = TOLERANCE[a.out.dtype]
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), tolerance)
    assert_same(merge(a, b), merge(b, a), tolerance)


def test_empty_partial_is_the_identity_of_merge(thirds):
    a = thirds[0]
    for merged in (merge(a, empty_partial(a.out)), merge(empty_partial(a.out), a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


def test_merge_of_unseen_rows_has_no_nan(thirds):
    """Neither side has seen row 0, only a row 1, only b row 2: -inf minus -inf must not appear."""
    _, a, b, _ = thirds
    for part, unseen in ((a, [0, 2]), (b, [0, 1])):
        part.out[:, unseen] = 0
        part.lse[:, unseen] = -math.inf
    merged = merge(a, b)
    assert torch.equal(merged.out[:, :3], torch.stack([a.out[:, 0], a.out[:, 1], b.out[:, 2]], 1))
    assert torch.equal(merged.lse[:, :3], torch.stack([a.lse[:, 0], a.lse[:, 1], b.lse[:, 2]], 1))
    assert torch.isfinite(merged.lse[:, 3:]).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_merge_ignores_the_out_of_rows_without_weight(thirds, garbage):
    """Some kernels leave NaN as the output of a row that sees none of its keys."""
    _, a, b, _ = thirds
    expected = merge(a, b)
    for rows, other in ((slice(2), b), (slice(2, 4), a)):
        expected.out[:, rows], expected.lse[:, rows] = other.out[:, rows], other.lse[:, rows]
    for part, rows in ((a, slice(2)), (b, slice(2, 4))):
        part.out[:, rows], part.lse[:, rows] = garbage, -math.inf
    for merged in (merge(a, b), merge(b, a)):
        assert_same(merged, expected, TOLERANCE[a.out.dtype])
    assert (merge(a, a).out[:, :2] == 0).all(), "unseen by both sides"


@pytest.mark.parametrize("level", [-5000.0, -100.0, 100.0, 5000.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, 200.0])
def test_scores_whose_exponential_overflows_float32(level, gap):
    """exp(88.8) is inf in float32, exp(-104) is 0: only differences of log-sum-exps may be exponentiated."""
    torch.manual_seed(0)
    a, b = (Partial(torch.randn(B, S, HQ, D), torch.full((B, S, HQ), x)) for x in (level, level - gap))
    share = 1 / (1 + math.exp(gap))
    out = (1 - share) * a.out.double() + share * b.out.double()
    lse = torch.full((B, S, HQ), level + math.log1p(math.exp(-gap)), dtype=torch.float64)
    assert_same(merge(a, b), Partial(out, lse), 1e-6)


def test_in_place_merge_changes_given_rows_only(thirds):
    _, a, b, _ = thirds
    rows = slice(1, 4)
    part = Partial(b.out[:, rows], b.lse[:, rows])
    expected = merge(Partial(a.out[:, rows], a.lse[:, rows]), part)
    total = Partial(a.out.clone(), a.lse.clone())
    merge_(total, rows, part)
    assert torch.equal(total.out, torch.cat([a.out[:, :1], expected.out, a.out[:, 4:]], 1))
    assert torch.equal(total.lse, torch.cat([a.lse[:, :1], expected.lse, a.lse[:, 4:]], 1))


@pytest.mark.parametrize(
    ("input_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_softmax_state_is_float32_or_float64(input_dtype, state_dtype):
    q = torch.zeros(B, S, HQ, D, dtype=input_dtype)
    start = empty_partial(q)
    assert accumulation_dtype(q) == start.out.dtype == start.lse.dtype == state_dtype
    assert start.out.shape == q.shape
    assert (start.lse == -math.inf).all()
    assert start.lse.shape == (B, S, HQ)
