"""Kernels compute the oracle's attention of a tile, and the tile's contribution to the gradients."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from longctx.attention import flash_cpu as flash_cpu_module
from longctx.attention import kernel as kernel_module
from longctx.attention.cudnn import cudnn
from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.flash_cuda import flash_cuda
from longctx.attention.kernel import Kernel, attend_over, attend_tiles, reference, tile_gradients
from longctx.attention.partial import Partial, empty_partial, merge_
from longctx.attention.tiles import Tile
from tests import oracle

EXACT = [(reference, torch.float64, 1e-10), (flash_cpu, torch.float64, 1e-10), (flash_cpu, torch.float32, 2e-6)]
exact = pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"), EXACT, ids=[f"{kernel.name}-{dtype}" for kernel, dtype, _ in EXACT]
)
both = pytest.mark.parametrize("kernel", [reference, flash_cpu], ids=lambda kernel: kernel.name)
heads = pytest.mark.parametrize(("hq", "hk"), [(3, 3), (6, 2), (4, 1), (8, 1), (10, 5)])

B = 2
# Below and above flash_cpu's limit for stacked heads (32 rows), and longer than one block of its kernel.
SHAPES = [
    # sq, sk, d, causal
    (1, 1, 5, True),
    (2, 2, 7, True),
    (31, 31, 13, True),
    (67, 67, 7, True),
    (1, 37, 5, False),
    (2, 1, 13, False),
    (31, 67, 7, False),
    (32, 31, 5, False),
    (67, 2, 13, False),
]
shapes = pytest.mark.parametrize(("sq", "sk", "d", "causal"), SHAPES)


def random_inputs(hq, hk, sq, sk, d, dtype=torch.float64):
    """Return random q, k, v and dout."""
    torch.manual_seed(0)
    rows_heads = ((sq, hq), (sk, hk), (sk, hk), (sq, hq))
    return [torch.randn(B, rows, heads, d, dtype=torch.float64).to(dtype) for rows, heads in rows_heads]


def mask_of(sq: int, sk: int, causal: bool) -> torch.Tensor:
    """Return the mask [sq sk]: a causal square if ``causal``; otherwise queries come after all keys and see all."""
    begin = 0 if causal else sk
    return oracle.visible(oracle.pack_rows([sq], [begin]), oracle.pack_rows([sk]))


def backward(kernel: Kernel, q, k, v, dout, causal: bool):
    part = kernel.forward(q, k, v, causal)
    return kernel.backward(dout, q, k, v, part.out, part.lse, causal)


@exact
@heads
@shapes
def test_forward_and_backward_match_the_oracle(kernel, dtype, tolerance, hq, hk, sq, sk, d, causal):
    q, k, v, dout = random_inputs(hq, hk, sq, sk, d, dtype)
    mask = mask_of(sq, sk, causal)
    part = kernel.forward(q, k, v, causal)
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, causal)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((part.out, part.lse, *grads), expected, strict=True):
        assert actual.dtype == dtype
        oracle.assert_close(actual, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sq", "sk"), [(1, 67), (31, 53), (2, 32), (3, 33)])
def test_few_rows_see_all_blocks_of_keys(sq, sk, dtype, monkeypatch):
    monkeypatch.setattr(flash_cpu_module, "_BLOCK_ROWS", 16 * B if dtype == torch.bfloat16 else 16)
    q, k, v, dout = random_inputs(6, 2, sq, sk, 13, dtype)
    part, mask = flash_cpu.forward(q, k, v, False), mask_of(sq, sk, False)
    grads = flash_cpu.backward(dout, q, k, v, part.out, part.lse, False)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((part.out, part.lse, *grads), expected, strict=True):
        assert actual.dtype == torch.float32
        oracle.assert_close(actual, exact, 2e-6)


@pytest.mark.parametrize("hq", [3, 9])
def test_error_in_float32_does_not_grow_with_the_number_of_keys(hq):
    q, k, v, dout = (x[:1] for x in random_inputs(hq, 3, 1, 65_537, 64, torch.float32))
    part, mask = flash_cpu.forward(q, k, v, False), torch.ones(1, 65_537, dtype=torch.bool)
    grads = flash_cpu.backward(dout, q, k, v, part.out, part.lse, False)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((part.out, part.lse, *grads), expected, strict=True):
        error = (actual.double() - exact).norm() / exact.norm()  # the mean of many values is far below unit scale
        assert error < 2e-6


@both
@heads
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_inputs_are_computed_in_float32(kernel, hq, hk, causal):
    """The error is that of float32 inputs: only the inputs themselves are bf16."""
    q, k, v, dout = random_inputs(hq, hk, 31, 31, 7, torch.bfloat16)
    mask = mask_of(31, 31, causal)
    part = kernel.forward(q, k, v, causal)
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, causal)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((part.out, part.lse, *grads), expected, strict=True):
        assert actual.dtype == torch.float32
        oracle.assert_close(actual, exact, 2e-6)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` stored as [b h s d], as caches often are."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other_head(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a view of a larger tensor, as the splits of a fused QKV projection are."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2]


def every_other_channel(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with a strided last axis."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@both
@pytest.mark.parametrize("store", [head_major, every_other_head, every_other_channel])
@pytest.mark.parametrize(("sq", "causal"), [(37, True), (37, False), (7, False)])
def test_strided_inputs_give_the_same_result(kernel, store, sq, causal):
    """The memory between the elements holds NaN, so that a kernel that reads it fails."""
    plain = random_inputs(6, 2, sq, 37, 7)
    strided = [store(x) for x in plain]
    assert not any(x.is_contiguous() for x in strided)
    actual, expected = kernel.forward(*strided[:3], causal), kernel.forward(*plain[:3], causal)
    oracle.assert_close(actual.out, expected.out, 1e-12)
    oracle.assert_close(actual.lse, expected.lse, 1e-12)
    q, k, v, dout = strided
    grads = kernel.backward(dout, q, k, v, store(expected.out), expected.lse, causal)
    for actual, exact in zip(grads, backward(kernel, *plain, causal), strict=True):
        oracle.assert_close(actual, exact, 1e-12)


@both
def test_expanded_dout_gives_exact_gradients(kernel):
    """``out.sum().backward()`` passes one number with strides of 0."""
    q, k, v, dout = random_inputs(6, 2, 37, 37, 7)
    one = torch.ones((), dtype=dout.dtype).expand(dout.shape)
    expected = oracle.gradients(q, k, v, mask_of(37, 37, True), one)
    for actual, exact in zip(backward(kernel, q, k, v, one, True), expected, strict=True):
        oracle.assert_close(actual, exact, 1e-10)


@pytest.mark.parametrize(
    ("rows", "causal", "stacked"), [(1, False, True), (31, False, True), (32, False, False), (31, True, False)]
)
def test_few_rows_stack_heads_that_share_keys(monkeypatch, rows, causal, stacked):
    """Keys are read once per KV head: the query heads that share one become rows.  Causal tiles cannot be stacked."""
    op, shapes_of_q = flash_cpu_module._forward_op, []

    def spy(q, *rest):
        shapes_of_q.append(tuple(q.shape))
        return op(q, *rest)

    monkeypatch.setattr(flash_cpu_module, "_forward_op", spy)
    q, k, v, _ = random_inputs(6, 2, rows, rows, 5)
    out = flash_cpu.forward(q, k, v, causal).out
    assert shapes_of_q == [(B, 2, 3 * rows, 5) if stacked else (B, 6, rows, 5)]
    oracle.assert_close(out, oracle.attention(q, k, v, mask_of(rows, rows, causal))[0], 1e-10)


@both
@heads
@shapes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_finite_result_hides_non_finite_inputs(kernel, hq, hk, sq, sk, d, causal, value):
    """torch's op gives zeros, with a log-sum-exp of 0, for a NaN query over fewer than 16 keys."""
    for bad, row in ((0, 0), (0, sq - 1), (1, 0), (1, sk - 1), (2, sk // 2)):
        inputs = random_inputs(hq, hk, sq, sk, d, torch.float32)[:3]
        inputs[bad][1, row, 0, d // 2] = value
        part, (out, lse) = kernel.forward(*inputs, causal), oracle.attention(*inputs, mask_of(sq, sk, causal))
        assert not (part.out.isfinite() & ~out.isfinite()).any()
        assert not (part.lse.isfinite() & ~lse.isfinite()).any()


def test_true_zeros_stay_zeros():
    q, k, v, _ = random_inputs(6, 2, 3, 7, 5)
    part = flash_cpu.forward(torch.zeros_like(q[:, :1]), k[:, :1], torch.zeros_like(v[:, :1]), True)
    assert (part.out == 0).all() and (part.lse == 0).all()


def test_empty_tile_fails_an_assertion():
    """The op would end the process with SIGFPE."""
    q, k, v, dout = random_inputs(6, 2, 3, 0, 5)
    with pytest.raises(AssertionError, match="empty tile"):
        flash_cpu.forward(q, k, v, False)
    with pytest.raises(AssertionError, match="empty tile"):
        flash_cpu.backward(dout, q, k, v, q, q[..., 0], False)


@pytest.mark.parametrize("kernel", [flash_cuda, cudnn], ids=lambda kernel: kernel.name)
def test_gpu_ops_accept_the_arguments(kernel):
    """Checks shapes and signatures only, on meta tensors; tests/gpu checks the values."""
    q, k, v, dout = (x.to("meta") for x in random_inputs(6, 2, 37, 37, 64, torch.bfloat16))
    part = kernel.forward(q, k, v, True)
    assert (part.out.shape, part.lse.shape) == (q.shape, q.shape[:-1])
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, True)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, torch.float32) for x in (q, k, v)]


# 67 keys, whose last 36 rows are the queries: a cached prefix in two pieces, and the new rows in two.
TILES = (
    Tile(0, 36, 0, 13),
    Tile(0, 36, 13, 31),
    Tile(0, 17, 31, 48, causal=True),
    Tile(17, 36, 31, 48),
    Tile(17, 36, 48, 67, causal=True),
)


@exact
def test_tiles_sum_to_the_whole_attention(kernel, dtype, tolerance):
    """Each tile's backward takes out and lse of the whole softmax, so that the gradients are plain sums."""
    q, k, v, dout = random_inputs(6, 2, 36, 67, 7, dtype)
    mask = oracle.visible(oracle.pack_rows([36], [31]), oracle.pack_rows([67]))
    whole = empty_partial(q)
    for tiles in (TILES[3:], TILES[:3]):  # in any order
        attend_tiles(whole, q, k, v, tiles, kernel)
    grads = tile_gradients(dout, q, k, v, whole, TILES, kernel)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((whole.out, whole.lse, *grads), expected, strict=True):
        oracle.assert_close(actual, exact, tolerance)


@pytest.mark.parametrize(("max_rows", "merges"), [(4096, 2), (5, 6), (1, 8)])
def test_partials_of_adjacent_tiles_are_merged_at_once(monkeypatch, max_rows, merges):
    """Four short documents, each with cached rows: a rectangle and a triangle each."""
    monkeypatch.setattr(kernel_module, "_MAX_MERGED_ROWS", max_rows)
    calls = []
    counting = replace(reference, merge=lambda total, *rest: (calls.append(rest), merge_(total, *rest)))
    new, cached = [2, 3, 1, 5], [3, 2, 7, 1]
    begins = list(accumulate(new, initial=0))
    keys = list(accumulate(map(sum, zip(new, cached, strict=True)), initial=0))
    full = [Tile(q, q + n, k, k + c) for q, n, k, c in zip(begins, new, keys, cached, strict=False)]
    own = [Tile(q, q + n, k + c, k + c + n, causal=True) for q, n, k, c in zip(begins, new, keys, cached, strict=False)]
    q, k, v, _ = random_inputs(6, 2, sum(new), sum(new) + sum(cached), 5)
    total = empty_partial(q)
    attend_tiles(total, q, k, v, [*own, *full], counting)
    mask = oracle.visible(
        oracle.pack_rows(new, cached), oracle.pack_rows([n + c for n, c in zip(new, cached, strict=True)])
    )
    out, lse = oracle.attention(q, k, v, mask)
    oracle.assert_close(total.out, out, 1e-12)
    oracle.assert_close(total.lse, lse, 1e-12)
    assert len(calls) == merges


@both
def test_rows_outside_all_tiles_are_unchanged(kernel):
    q, k, v, dout = random_inputs(6, 2, 5, 7, 5)
    total = empty_partial(q)
    attend_tiles(total, q, k, v, [Tile(1, 3, 2, 4, causal=True)], kernel)
    assert (total.lse[:, [0, 3, 4]] == -torch.inf).all()
    assert torch.isfinite(total.lse[:, 1:3]).all()
    whole = Partial(total.out, total.lse.nan_to_num(neginf=0.0))
    dq, dk, dv = tile_gradients(dout, q, k, v, whole, [Tile(1, 3, 2, 4, causal=True)], kernel)
    for grad, touched in ((dq, [1, 2]), (dk, [2, 3]), (dv, [2, 3])):
        rows = grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
        assert set(rows) <= set(touched)
    assert dv[:, 2:4].abs().sum() > 0


@pytest.mark.parametrize(
    ("tiles", "merged"),
    [
        ([Tile(0, 5, 1, 7)], False),
        ([Tile(0, 5, 2, 7, causal=True)], False),
        ([Tile(0, 5, 2, 7, causal=True, mirrored=True)], True),
        ([Tile(1, 4, 0, 7)], True),
        ([Tile(0, 5, 0, 3), Tile(0, 5, 3, 7)], True),
    ],
    ids=str,
)
def test_one_tile_of_all_rows_is_not_merged(tiles, merged):
    q, k, v, _ = random_inputs(6, 2, 5, 7, 13)
    expected = empty_partial(q)
    attend_tiles(expected, q, k, v, tiles, reference)
    merges = []
    counting = replace(reference, merge=lambda *args: merges.append(args) or merge_(*args))
    result = attend_over(q, k, v, tiles, counting)
    oracle.assert_close(result.out, expected.out, 1e-14)
    oracle.assert_close(result.lse.nan_to_num(neginf=0), expected.lse.nan_to_num(neginf=0), 1e-14)
    assert bool(merges) == merged
