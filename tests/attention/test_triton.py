"""The Triton kernels in Triton's interpreter on CPU, against the oracle; and compiled for GPUs, which takes no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longctx import attention
from longctx.attention import backends, triton_flash
from longctx.attention.backends import kernel_for
from longctx.attention.kernel import attend_tiles, tile_gradients
from longctx.attention.layout import contiguous
from longctx.attention.mask import window
from longctx.attention.partial import Partial, empty_partial, merge, merge_
from longctx.attention.tiles import visible_tiles
from longctx.attention.triton_flash import BlockSizes, interpreted
from tests import oracle

if triton_flash.installed:
    from longctx.attention import triton_kernels
needs_triton = pytest.mark.skipif(not triton_flash.installed, reason="the package triton is not installed")
interpreter = pytest.mark.skipif(
    not triton_flash.installed or torch.cuda.is_available(),
    reason="needs the package triton, and no GPU, where tests/gpu runs the kernels",
)


def random_inputs(batch, hq, hk, sq, sk, d, dtype=torch.float32):
    """Return random q, k, v and dout."""
    torch.manual_seed(0)
    rows_heads = ((sq, hq), (sk, hk), (sk, hk), (sq, hq))
    return [torch.randn(batch, rows, heads, d).to(dtype) for rows, heads in rows_heads]


def use_blocks(monkeypatch, rows: int, keys: int) -> None:
    """Use small blocks, so that short tiles have several: cut by the diagonal, by the last row, or whole."""
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: BlockSizes(rows, keys, 4, 2))


@interpreter
@pytest.mark.parametrize(
    ("blocks", "batch", "hq", "hk", "sq", "sk", "d", "causal"),
    [
        ((16, 32), 1, 3, 1, 53, 53, 7, True),
        ((32, 16), 1, 2, 2, 53, 53, 16, True),
        ((16, 16), 1, 4, 2, 19, 37, 5, False),
        ((16, 16), 2, 2, 1, 1, 3, 17, False),
        ((16, 16), 1, 1, 1, 1, 1, 1, True),
    ],
)
def test_float32_partials_and_gradients_match_the_oracle(monkeypatch, blocks, batch, hq, hk, sq, sk, d, causal):
    use_blocks(monkeypatch, *blocks)
    q, k, v, dout = random_inputs(batch, hq, hk, sq, sk, d)
    mask = oracle.visible(oracle.pack_rows([sq], [0 if causal else sk]), oracle.pack_rows([sk]))
    part = interpreted.forward(q, k, v, causal)
    grads = interpreted.backward(dout, q, k, v, part.out, part.lse, causal)
    for actual, exact in zip((part.out, part.lse), oracle.attention(q, k, v, mask), strict=True):
        oracle.assert_close(actual, exact, 3e-7)
    for actual, exact in zip(grads, oracle.gradients(q, k, v, mask, dout), strict=True):
        oracle.assert_close(actual, exact, 1e-6)


MUTATIONS = {
    "scores without scale": (
        "_dot(q, tl.trans(k), INTERPRETED) * (scale * LOG2E)",
        "_dot(q, tl.trans(k), INTERPRETED)",
    ),
    "dq without scale": ("_store(DQ, dq * scale,", "_store(DQ, dq,"),
    "dk without scale": ("_store(DK, dk * scale,", "_store(DK, dk,"),
    "dk and dv exchanged": ("dk, dv = sums\n    _store", "dv, dk = sums\n    _store"),
    "log-sum-exp in base 2": ("largest * LN2 + tl.log(total)", "largest + tl.log2(total)"),
    "sums not rescaled": ("values = values * remaining +", "values = values +"),
    "other KV heads": ("kv = head // (hq // hk)", "kv = head % hk"),
    "the diagonal hidden from dk": ("tl.where(keys <= rows, scores", "tl.where(keys < rows, scores"),
    "the future seen": ("if CAUSAL:\n            seen = seen", "if not CAUSAL:\n            seen = seen"),
    "delta of the wrong sign": ("INTERPRETED) - delta)", "INTERPRETED) + delta)"),
    "keys after the last one": ("seen = keys < sk", "seen = keys >= 0"),
    "weights of a merge exchanged": ("out_a * weight_a + out_b * weight_b", "out_a * weight_b + out_b * weight_a"),
    "merged into the first rows": ("head, first + row, D, ROWS", "head, row, D, ROWS"),
    "NaN of an unseen row": ('out_b = tl.where(b == float("-inf"), 0.0, ', "out_b = ("),
    "layout transposed": (
        "* length + first) * heads + head) * D\n    return start + rows * (heads * D)",
        "* heads + head) * length + first) * D\n    return start + rows * D",
    ),
}


@interpreter
@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistake_in_the_kernels_is_noticed(monkeypatch, tmp_path, mistake):
    old, new = MUTATIONS[mistake]
    source = Path(str(triton_kernels.__file__)).read_text()
    assert old in source
    (tmp_path / "mutated.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated", tmp_path / "mutated.py")
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(attention, "triton_kernels", mutated)
    with pytest.raises(AssertionError):
        compare_small_tiles(monkeypatch)


def compare_small_tiles(monkeypatch) -> None:
    test_merge_equals_that_of_torch_in_float64((2, 61, 23, 33), 17)
    for case in ((19, 19, 5, True), (3, 19, 5, False)):
        test_float32_partials_and_gradients_match_the_oracle(monkeypatch, (16, 16), 1, 4, 2, *case)


@interpreter
@pytest.mark.parametrize(
    ("sizes", "first"), [((1, 53, 53, 7), 0), ((2, 61, 23, 33), 17), ((1, 40, 16, 128), 24), ((1, 3, 3, 1), 0)], ids=str
)
def test_merge_equals_that_of_torch_in_float64(sizes, first):
    """Rows that see keys of one side only, or of neither: out may then be NaN in the merged part, not in the total."""
    batch, length, sq, d = sizes
    torch.manual_seed(0)
    total, part = (Partial(torch.randn(batch, n, 3, d), 3 * torch.randn(batch, n, 3)) for n in (length, sq))
    for x, unseen in ((total, (first, first + 2)), (part, (1, 2))):
        x.lse[:, unseen] = -torch.inf
        x.out[:, unseen] = 0 if x is total else torch.nan
    for x, lost in ((total, first), (part, sq - 1)):  # rows without a finite score stay NaN
        x.lse[:, lost, 1] = x.out[:, lost, 1] = torch.nan
    exact = Partial(total.out.double(), total.lse.double())
    merge_(exact, slice(first, first + sq), Partial(part.out.double(), part.lse.double()))
    interpreted.merge(total, slice(first, first + sq), part)
    assert torch.equal(total.lse == -torch.inf, exact.lse == -torch.inf)
    assert torch.equal(total.lse.isnan(), exact.lse.isnan()) and exact.lse.isnan().any()
    assert torch.equal(total.out.isnan(), exact.out.isnan())
    oracle.assert_close(*(x.out.nan_to_num() for x in (total, exact)), 1e-7)
    oracle.assert_close(*(x.lse.nan_to_num(0, 0, 0) for x in (total, exact)), 1e-7)


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_give_float32_results(monkeypatch, dtype):
    """Weights are rounded to the dtype of the values, once: an error of at most half an epsilon."""
    use_blocks(monkeypatch, 16, 16)
    q, k, v, dout = random_inputs(1, 2, 1, 29, 29, 16, dtype)
    mask = oracle.visible(oracle.pack_rows([29]), oracle.pack_rows([29]))
    part = interpreted.forward(q, k, v, True)
    grads = interpreted.backward(dout, q, k, v, part.out, part.lse, True)
    out, lse = oracle.attention(q, k, v, mask)
    assert {x.dtype for x in (part.out, part.lse, *grads)} == {torch.float32}
    oracle.assert_close(part.lse, lse, 3e-7)
    for actual, exact in zip((part.out, *grads), (out, *oracle.gradients(q, k, v, mask, dout)), strict=True):
        oracle.assert_close(actual, exact, torch.finfo(dtype).eps / 2)
    assert not torch.equal(part.out, part.out.to(dtype).float())


@interpreter
def test_tiles_of_a_window_and_their_mirrors_sum_to_the_whole(monkeypatch):
    """A window has triangles at its near edge, mirrored ones at its far edge, and rectangles between."""
    use_blocks(monkeypatch, 16, 16)
    (spans,) = contiguous(29, 1).ranks
    tiles = visible_tiles(spans, spans, window(12))
    assert any(tile.mirrored for tile in tiles) and not all(tile.causal for tile in tiles)
    q, k, v, dout = random_inputs(1, 2, 1, 29, 29, 5)
    mask = oracle.visible(oracle.pack_rows([29]), oracle.pack_rows([29]), before=11)
    total = empty_partial(q)
    attend_tiles(total, q, k, v, tiles, interpreted)
    grads = tile_gradients(dout, q, k, v, total, tiles, interpreted)
    expected = *oracle.attention(q, k, v, mask), *oracle.gradients(q, k, v, mask, dout)
    for actual, exact in zip((total.out, total.lse, *grads), expected, strict=True):
        oracle.assert_close(actual, exact, 1e-6)


@interpreter
def test_bfloat16_error_does_not_grow_with_the_number_of_partials(monkeypatch):
    """32 merged partials, of 13 keys each, are as exact as one; partials rounded to bfloat16 are not."""
    q, k, v, _ = random_inputs(1, 2, 1, 64, 416, 32, torch.bfloat16)
    exact, _ = oracle.attention(q, k, v, torch.ones(64, 416, dtype=torch.bool))

    def error(parts: int, rounded: bool = False) -> float:
        total = empty_partial(q)
        for keys, values in zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True):
            part = interpreted.forward(q, keys, values, False)
            total = merge(total, Partial(part.out.bfloat16().float(), part.lse) if rounded else part)
        return float((total.out.bfloat16().double() - exact).norm() / exact.norm())

    one = error(1)
    assert error(32) <= 1.02 * one
    assert error(32, rounded=True) > 1.02 * one


@interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN and infinity
def test_no_finite_result_hides_non_finite_inputs():
    for bad, value in ((0, torch.nan), (1, torch.inf), (2, torch.nan)):
        q, k, v, _ = random_inputs(1, 1, 1, 3, 3, 5)
        (q, k, v)[bad][0, 1, 0, 2] = value
        part = interpreted.forward(q, k, v, True)
        out, lse = oracle.attention(q, k, v, oracle.visible(oracle.pack_rows([3]), oracle.pack_rows([3])))
        assert not (part.out.isfinite() & ~out.isfinite()).any()
        assert not (part.lse.isfinite() & ~lse.isfinite()).any()


@interpreter
def test_interpreter_is_chosen_on_a_cpu_only_if_triton_interprets(monkeypatch):
    assert kernel_for("triton", "cpu", "bfloat16") is interpreted
    monkeypatch.setattr(backends, "in_interpreter", lambda: False)
    with pytest.raises(ValueError, match=r"context\.kernel=triton does not take bfloat16 on cpu; use context\.kernel="):
        kernel_for("triton", "cpu", "bfloat16")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(triton_flash, "installed", False)
    with pytest.raises(ValueError, match=r"needs the package triton, .* use context\.kernel=flash_cuda"):
        kernel_for("triton", "cuda", "bfloat16")


@needs_triton
def test_kernels_compile_for_gpus(tmp_path):
    """Each kernel for another architecture; docs/results/gpu/cubins.json has all."""
    code = (
        "import json, torch; from tests.attention.cubins import compile_for as c; print(json.dumps(["
        "c('forward', 80, 64, torch.bfloat16), c('backward_q', 90, 64, torch.bfloat16), "
        "c('backward_kv', 100, 64, torch.bfloat16), c('merge', 90, 128, torch.bfloat16)]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert 0 < row["registers"] <= 255 and row["spilled_bytes"] == 0 and row["shared_bytes"] <= 163 * 1024, row
