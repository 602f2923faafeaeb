"""The table of supported combinations in longctx/attention/README.md: each cell is run here.

``pytest tests/parallel/test_table.py --write-table`` rewrites the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.attention import backends
from longctx.attention.backends import KERNELS, kernel_for
from longctx.attention.kernel import Kernel, attend_tiles
from longctx.attention.layout import Layout, contiguous, documents, zigzag
from longctx.attention.mask import BIDIRECTIONAL, CAUSAL, Mask, window
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.parallel.comm import Comm
from longctx.parallel.merge import gather_merge
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadWorld, run_threads
from longctx.parallel.ulysses import over_heads, share_of_heads
from tests import oracle
from tests.parallel.problem import Problem, problem, solve

TABLE = Path(__file__).parents[2] / "longctx" / "attention" / "README.md"
BEGIN, END = "<!-- the table: written by tests/parallel/test_table.py -->\n", "<!-- the end of the table -->\n"

GQA = {1: (6, 6), 3: (6, 2), 4: (8, 2), 8: (8, 1)}  # query heads per KV head
# Half an epsilon is the error of rounding the exact result once to half precision.
HALF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6} | HALF
ON_CPU = [name for name, kernel in KERNELS.items() if "cpu" in kernel.devices]
COLUMNS = [(name, dtype) for name in ON_CPU for dtype in TOLERANCE]


@dataclass(frozen=True)
class MaskCase:
    """A mask, a layout of one sequence or of packed documents, and whether there are attention sinks."""

    mask: Mask
    layout: Callable[[int], Layout] = lambda size: zigzag(29, size)
    sinks: bool = False


MASKS = {
    "causal": MaskCase(CAUSAL),
    "causal, documents": MaskCase(CAUSAL, lambda size: documents([11, 0, 17, 1], size)),
    "causal, attention sinks": MaskCase(CAUSAL, sinks=True),
    "window of 7": MaskCase(window(7)),
    "window of 7, contiguous layout": MaskCase(window(7), lambda size: contiguous(37, size)),
    "window of 3, documents": MaskCase(window(3), lambda size: documents([11, 0, 17, 1], size)),
    "bidirectional": MaskCase(BIDIRECTIONAL),
    "bidirectional, documents": MaskCase(BIDIRECTIONAL, lambda size: documents([11, 0, 17, 1], size)),
    "5 before, 3 after": MaskCase(Mask(5, 3)),
}
# Name -> (ulysses, ring, strategy). Strategy None: every rank has all query rows, and `gather_merge` merges partials.
VARIANTS = {
    "pass-KV ring": (1, 3, "pass_kv"),
    "pass-Q ring": (1, 3, "pass_q"),
    "all-gather KV": (1, 3, "all_gather_kv"),
    "Ulysses": (2, 1, "pass_kv"),
    "Ulysses x pass-KV ring": (2, 2, "pass_kv"),
    "Ulysses x pass-Q ring": (2, 2, "pass_q"),
    "gather_merge (decode)": (2, 2, None),
}


def run_variant(
    variant: str, case: MaskCase, task: Problem, kernel: Kernel, sinks: Tensor | None
) -> list[list[Tensor]]:
    """Return for each context rank its rows of out, dq, dk and dv, and the gradient of its heads' sinks.

    Decode has out alone.
    """
    ulysses, ring, strategy = VARIANTS[variant]

    def rank_main(world: ThreadWorld, rank: int) -> list[Tensor]:
        first, member = rank - rank % ulysses, rank % ulysses
        around = world.group(rank, range(member, world.size, ulysses))
        queries, keys = (layout.gather(ulysses) for layout in (task.queries, task.keys))
        if strategy is None:
            return [decode_output(case.mask, task, kernel, world.group(rank), around.rank, ulysses, sinks)]
        mine = None if sinks is None else sinks.chunk(ulysses)[member].clone().requires_grad_()
        inner = ring_attention(Ring(around, queries, keys, case.mask), kernel, STRATEGIES[strategy], mine)
        rows = [task.queries.rows(first + u) for u in range(ulysses)]
        outer = over_heads(world.group(rank, range(first, first + ulysses)), rows, inner)
        answers, _ = solve(outer, task, rank, lambda: around.traffic)
        return answers if mine is None else [*answers, mine.grad]

    return run_threads(ulysses * ring, rank_main)


def decode_output(
    mask: Mask, task: Problem, kernel: Kernel, comm: Comm, ring_rank: int, ulysses: int, sinks: Tensor | None
) -> Tensor:
    """Return the complete output of all query rows, as `gather_merge` gives it to every rank."""
    keys = task.keys.gather(ulysses)
    q = share_of_heads(task.q, ulysses, comm.rank % ulysses)
    k, v = (share_of_heads(keys.shard(x, ring_rank, 1), ulysses, comm.rank % ulysses) for x in (task.k, task.v))
    partial = empty_partial(q)
    tiles = visible_tiles(task.queries.on_one_rank().ranks[0], keys.ranks[ring_rank], mask)
    attend_tiles(partial, q, k, v, tiles, kernel)
    return gather_merge(partial, comm, ulysses, sinks)


def sink_reference(task: Problem, mask: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv and the sinks' gradient, by autograd over a softmax with one more column, of value 0."""
    leaves = [x.double().requires_grad_() for x in (task.q, task.k, task.v, sinks)]
    q, k, v, extra = leaves
    sharing = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k.repeat_interleave(sharing, 2)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[None, :, None, :], -torch.inf)
    column = extra[None, None, :, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("bqhk,bkhd->bqhd", weights, v.repeat_interleave(sharing, 2))
    return out.detach(), *torch.autograd.grad(out, leaves, task.dout.double())


def expected_results(task: Problem, case: MaskCase, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """Return the oracle's out, dq, dk and dv, and the sinks' gradient if the case has sinks."""
    rows = oracle.pack_rows(task.queries.lengths)
    mask = oracle.visible(rows, rows, case.mask.before, case.mask.after)
    if sinks is not None:
        return sink_reference(task, mask, sinks)
    return oracle.attention(task.q, task.k, task.v, mask)[0], *oracle.gradients(task.q, task.k, task.v, mask, task.dout)


def assert_exact(variant: str, case: MaskCase, kernel: Kernel, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    ulysses, ring, strategy = VARIANTS[variant]
    layout = case.layout(ring).split(ulysses)
    task = problem(layout, heads=heads, dtype=dtype)
    sinks = torch.randn(heads[0]).to(dtype) if case.sinks else None
    results, expected = run_variant(variant, case, task, kernel, sinks), expected_results(task, case, sinks)
    if strategy is None:
        for (out,) in results:
            oracle.assert_close(out, expected[0], TOLERANCE[dtype])
        return
    for parts, whole in zip(zip(*results, strict=True), expected, strict=False):
        if whole.dim() == 4:
            oracle.assert_close(layout.unshard(parts, dim=1), whole, TOLERANCE[dtype])
    if sinks is not None:
        by_member = [
            torch.stack([x[-1].double() for x in results[member::ulysses]]).sum(0) for member in range(ulysses)
        ]
        # Each rank rounds the contribution of its rows.
        oracle.assert_close(torch.cat(by_member), expected[-1], ring * TOLERANCE[dtype])


@cache
def table_row(variant: str, name: str) -> str:
    """Return one row of the table.  Raises AssertionError if a combination in it is not exact."""
    case, cells = MASKS[name], []
    for kernel, dtype in COLUMNS:
        for heads in GQA.values():
            assert_exact(variant, case, KERNELS[kernel], dtype, heads)
        cells.append(", ".join(map(str, GQA)))
    return f"| {variant} | {name} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cell_is_exact(variant, name):
    """For every CPU kernel, every dtype and every number of query heads per KV head."""
    assert table_row(variant, name)


def test_table_lists_what_was_run(pytestconfig):
    columns = [f"{kernel} {str(dtype).removeprefix('torch.')}" for kernel, dtype in COLUMNS]
    lines = ["| strategy | mask | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    lines += [table_row(variant, name) for variant in VARIANTS for name in MASKS]
    table = "\n".join(lines) + "\n"
    before, _, rest = TABLE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if pytestconfig.getoption("--write-table"):
        TABLE.write_text(before + BEGIN + table + END + after)
    assert TABLE.read_text() == before + BEGIN + table + END + after, (
        "the table is out of date; rewrite it with --write-table"
    )


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ON_CPU])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_kernel_is_refused_on_cpu(monkeypatch, name, dtype):
    monkeypatch.setattr(backends, "in_interpreter", lambda: False)
    task = problem(zigzag(7, 1), dtype=getattr(torch, dtype))
    with pytest.raises(
        ValueError, match=rf"kernel {name} takes bfloat16 or float16.* on cuda, not .*use context.kernel=ref"
    ):
        ring_attention(Ring(ThreadWorld(1).group(0), task.queries, task.keys), KERNELS[name], STRATEGIES["pass_kv"])(
            task.q, task.k, task.v
        )
    with pytest.raises(
        ValueError, match=rf"context\.kernel={name} does not take {dtype} on cpu; use context.kernel=reference or flash"
    ):
        kernel_for(name, "cpu", dtype)


def test_kernel_of_the_cpu_is_refused_on_a_gpu():
    with pytest.raises(ValueError, match=r"use context\.kernel=reference or flash_cuda"):
        kernel_for("flash_cpu", "cuda", "bfloat16")


@pytest.mark.parametrize(
    ("heads", "change", "message"),
    [
        ((6, 4), lambda q, k, v: (q, k, v), "6 query heads of dimension 5, 4 KV heads"),
        ((6, 2), lambda q, k, v: (q, k, v[..., :3]), "use one head dimension"),
        (
            (6, 2),
            lambda q, k, v: (q.int(), k, v),
            "not torch.int32 on cpu; use context.kernel=reference",
        ),
    ],
)
def test_untested_inputs_are_refused(heads, change, message):
    task = problem(zigzag(7, 1), heads=heads)
    with pytest.raises(ValueError, match=message):
        KERNELS["reference"].refuse_untested(*change(task.q, task.k, task.v))


def test_head_dim_that_a_kernel_does_not_take_is_refused():
    task, eights = problem(zigzag(7, 1), d=5), replace(KERNELS["reference"], name="eights", head_dim_multiple=8)
    with pytest.raises(
        ValueError, match=r"head dimensions that are multiples of 8, not 5; use context\.kernel=reference"
    ):
        eights.refuse_untested(task.q, task.k, task.v)
