"""Every kernel gives the oracle's attention of a tile, and a tile's share of the gradients of the whole."""

from itertools import accumulate

import pytest
import torch

from longctx.attention import flash_cpu as flash_cpu_module
from longctx.attention import kernel as kernel_module
from longctx.attention.cudnn import cudnn
from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.flash_cuda import flash_cuda
from longctx.attention.kernel import Kernel, attend_tiles, reference, tile_gradients
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
# Below and above flash_cpu's fold at 32 rows, and past one block of its kernel.
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


def random(hq, hk, sq, sk, d, dtype=torch.float64):
    """q, k, v, dout."""
    torch.manual_seed(0)
    rows_heads = ((sq, hq), (sk, hk), (sk, hk), (sq, hq))
    return [torch.randn(B, rows, heads, d, dtype=torch.float64).to(dtype) for rows, heads in rows_heads]


def mask_of(sq: int, sk: int, causal: bool) -> torch.Tensor:
    """Of a square on the diagonal, or of queries behind all keys."""
    begin = 0 if causal else sk
    return oracle.visible(oracle.packed([sq], [begin]), oracle.packed([sk]))


def backward(kernel: Kernel, q, k, v, dout, causal: bool):
    part = kernel.forward(q, k, v, causal)
    return kernel.backward(dout, q, k, v, part.out, part.lse, causal)


@exact
@heads
@shapes
def test_forward_and_backward(kernel, dtype, tolerance, hq, hk, sq, sk, d, causal):
    q, k, v, dout = random(hq, hk, sq, sk, d, dtype)
    mask = mask_of(sq, sk, causal)
    part = kernel.forward(q, k, v, causal)
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, causal)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for got, right in zip((part.out, part.lse, *grads), expected, strict=True):
        assert got.dtype == dtype
        oracle.assert_close(got, right, tolerance)


@both
@heads
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_inputs_are_computed_in_float32(kernel, hq, hk, causal):
    """As good as if the inputs had been upcast before; only what is handed over is bf16."""
    q, k, v, dout = random(hq, hk, 31, 31, 7, torch.bfloat16)
    mask = mask_of(31, 31, causal)
    part = kernel.forward(q, k, v, causal)
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, causal)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for got, right in zip((part.out, part.lse, *grads), expected, strict=True):
        assert got.dtype == torch.float32
        oracle.assert_close(got, right, 2e-6)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """Stored [b h s d], as caches often are."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other_head(x: torch.Tensor) -> torch.Tensor:
    """A part of a larger tensor, as the splits of a fused QKV projection are."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2]


def every_other_channel(x: torch.Tensor) -> torch.Tensor:
    """The last axis is strided too."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@both
@pytest.mark.parametrize("stored", [head_major, every_other_head, every_other_channel])
@pytest.mark.parametrize(("sq", "causal"), [(37, True), (37, False), (7, False)])
def test_inputs_may_be_strided(kernel, stored, sq, causal):
    """The same numbers however they lie in memory; a kernel that reads past them meets NaN."""
    plain = random(6, 2, sq, 37, 7)
    strided = [stored(x) for x in plain]
    assert not any(x.is_contiguous() for x in strided)
    mine, theirs = kernel.forward(*strided[:3], causal), kernel.forward(*plain[:3], causal)
    oracle.assert_close(mine.out, theirs.out, 1e-12)
    oracle.assert_close(mine.lse, theirs.lse, 1e-12)
    q, k, v, dout = strided
    mine = kernel.backward(dout, q, k, v, stored(theirs.out), theirs.lse, causal)
    for got, right in zip(mine, backward(kernel, *plain, causal), strict=True):
        oracle.assert_close(got, right, 1e-12)


@both
def test_a_gradient_may_be_expanded(kernel):
    """``out.sum().backward()`` hands over one number with strides of 0."""
    q, k, v, dout = random(6, 2, 37, 37, 7)
    one = torch.ones((), dtype=dout.dtype).expand(dout.shape)
    exact = oracle.gradients(q, k, v, mask_of(37, 37, True), one)
    for got, right in zip(backward(kernel, q, k, v, one, True), exact, strict=True):
        oracle.assert_close(got, right, 1e-10)


@pytest.mark.parametrize(
    ("rows", "causal", "folded"), [(1, False, True), (31, False, True), (32, False, False), (31, True, False)]
)
def test_few_rows_of_shared_heads_are_folded(monkeypatch, rows, causal, folded):
    """Keys are read once per KV head: the heads that share one become rows.  A triangle cannot be folded so."""
    op, asked = flash_cpu_module._forward_op, []

    def spy(q, *rest):
        asked.append(tuple(q.shape))
        return op(q, *rest)

    monkeypatch.setattr(flash_cpu_module, "_forward_op", spy)
    q, k, v, _ = random(6, 2, rows, rows, 5)
    out = flash_cpu.forward(q, k, v, causal).out
    assert asked == [(B, 2, 3 * rows, 5) if folded else (B, 6, rows, 5)]
    oracle.assert_close(out, oracle.attention(q, k, v, mask_of(rows, rows, causal))[0], 1e-10)


def test_an_empty_tile_is_refused():
    """The op ends the process on one: SIGFPE."""
    q, k, v, dout = random(6, 2, 3, 0, 5)
    with pytest.raises(AssertionError, match="empty tile"):
        flash_cpu.forward(q, k, v, False)
    with pytest.raises(AssertionError, match="empty tile"):
        flash_cpu.backward(dout, q, k, v, q, q[..., 0], False)


@pytest.mark.parametrize("kernel", [flash_cuda, cudnn], ids=lambda kernel: kernel.name)
def test_a_gpus_ops_take_what_they_are_given(kernel):
    """Shapes and signatures only, on tensors without numbers: tests/gpu has the rest."""
    q, k, v, dout = (x.to("meta") for x in random(6, 2, 37, 37, 64, torch.bfloat16))
    part = kernel.forward(q, k, v, True)
    assert (part.out.shape, part.lse.shape) == (q.shape, q.shape[:-1])
    grads = kernel.backward(dout, q, k, v, part.out, part.lse, True)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, torch.float32) for x in (q, k, v)]


# 67 rows of which the last 36 are the queries: a cached prefix in two pieces, and the new rows in two.
TILES = (
    Tile(0, 36, 0, 13),
    Tile(0, 36, 13, 31),
    Tile(0, 17, 31, 48, causal=True),
    Tile(17, 36, 31, 48),
    Tile(17, 36, 48, 67, causal=True),
)


@exact
def test_tiles_add_up_to_the_whole(kernel, dtype, tolerance):
    """Each tile's backward takes out and lse of the whole softmax, so that their shares are just summed."""
    q, k, v, dout = random(6, 2, 36, 67, 7, dtype)
    mask = oracle.visible(oracle.packed([36], [31]), oracle.packed([67]))
    whole = empty_partial(q)
    for tiles in (TILES[3:], TILES[:3]):  # in any order
        attend_tiles(whole, q, k, v, tiles, kernel)
    grads = tile_gradients(dout, q, k, v, whole, TILES, kernel)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for got, right in zip((whole.out, whole.lse, *grads), expected, strict=True):
        oracle.assert_close(got, right, tolerance)


@pytest.mark.parametrize(("most", "merges"), [(4096, 2), (5, 6), (1, 8)])
def test_what_neighbours_say_is_merged_at_once(monkeypatch, most, merges):
    """Four short documents, each behind what is cached of it: a rectangle and a triangle each."""
    monkeypatch.setattr(kernel_module, "_ROWS_TOGETHER", most)
    asked = []
    monkeypatch.setattr(kernel_module, "absorb", lambda seen, *rest: (asked.append(rest), merge_(seen, *rest)))
    new, cached = [2, 3, 1, 5], [3, 2, 7, 1]
    begins = list(accumulate(new, initial=0))
    keys = list(accumulate(map(sum, zip(new, cached, strict=True)), initial=0))
    full = [Tile(q, q + n, k, k + c) for q, n, k, c in zip(begins, new, keys, cached, strict=False)]
    own = [Tile(q, q + n, k + c, k + c + n, causal=True) for q, n, k, c in zip(begins, new, keys, cached, strict=False)]
    q, k, v, _ = random(6, 2, sum(new), sum(new) + sum(cached), 5)
    seen = empty_partial(q)
    attend_tiles(seen, q, k, v, [*own, *full], reference)
    mask = oracle.visible(oracle.packed(new, cached), oracle.packed([n + c for n, c in zip(new, cached, strict=True)]))
    out, lse = oracle.attention(q, k, v, mask)
    oracle.assert_close(seen.out, out, 1e-12)
    oracle.assert_close(seen.lse, lse, 1e-12)
    assert len(asked) == merges


@both
def test_rows_that_no_tile_names_are_left_alone(kernel):
    q, k, v, dout = random(6, 2, 5, 7, 5)
    seen = empty_partial(q)
    attend_tiles(seen, q, k, v, [Tile(1, 3, 2, 4, causal=True)], kernel)
    assert (seen.lse[:, [0, 3, 4]] == -torch.inf).all()
    assert torch.isfinite(seen.lse[:, 1:3]).all()
    whole = Partial(seen.out, seen.lse.nan_to_num(neginf=0.0))
    dq, dk, dv = tile_gradients(dout, q, k, v, whole, [Tile(1, 3, 2, 4, causal=True)], kernel)
    for grad, touched in ((dq, [1, 2]), (dk, [2, 3]), (dv, [2, 3])):
        rows = grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
        assert set(rows) <= set(touched)
    assert dv[:, 2:4].abs().sum() > 0
