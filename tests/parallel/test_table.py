"""What can be combined with what: each cell of longctx/attention/README.md is run here, and the table written from it.

``pytest tests/parallel/test_table.py --write-table`` writes it anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.attention.backends import KERNELS, kernel_for
from longctx.attention.kernel import Kernel, attend_tiles
from longctx.attention.layout import Layout, contiguous, documents, zigzag
from longctx.attention.mask import BIDIRECTIONAL, CAUSAL, Mask, window
from longctx.attention.partial import empty_partial
from longctx.attention.tiles import visible_tiles
from longctx.parallel.comm import Comm
from longctx.parallel.ring import Ring, gather_merge
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import ThreadWorld, run_threads
from longctx.parallel.ulysses import over_heads, share_of_heads
from tests import oracle
from tests.parallel.problem import Problem, problem, solve

TABLE = Path(__file__).parents[2] / "longctx" / "attention" / "README.md"
BEGIN, END = "<!-- the table: written by tests/parallel/test_table.py -->\n", "<!-- the end of the table -->\n"

GQA = {1: (6, 6), 3: (6, 2), 4: (8, 2), 8: (8, 1)}  # query heads per KV head
# Rounding the exact answer once to a half precision may cost half an epsilon; so may ours, and no more.
HALF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6} | HALF
ON_CPU = [name for name, kernel in KERNELS.items() if "cpu" in kernel.devices]
COLUMNS = [(name, dtype) for name in ON_CPU for dtype in TOLERANCE]


@dataclass(frozen=True)
class Masked:
    """A mask, on one sequence or on packed documents, with or without sinks."""

    mask: Mask
    layout: Callable[[int], Layout] = lambda size: zigzag(29, size)
    sinks: bool = False


MASKS = {
    "causal": Masked(CAUSAL),
    "causal, documents": Masked(CAUSAL, lambda size: documents([11, 0, 17, 1], size)),
    "causal, attention sinks": Masked(CAUSAL, sinks=True),
    "window of 7": Masked(window(7)),
    "window of 7, contiguous layout": Masked(window(7), lambda size: contiguous(37, size)),
    "window of 3, documents": Masked(window(3), lambda size: documents([11, 0, 17, 1], size)),
    "bidirectional": Masked(BIDIRECTIONAL),
    "bidirectional, documents": Masked(BIDIRECTIONAL, lambda size: documents([11, 0, 17, 1], size)),
    "5 before, 3 after": Masked(Mask(5, 3)),
}
# Way -> (ulysses, ring, strategy); None where all rows are on every rank and the answers meet.
WAYS = {
    "pass-KV ring": (1, 3, "pass_kv"),
    "pass-Q ring": (1, 3, "pass_q"),
    "all-gather of KV": (1, 3, "all_gather_kv"),
    "Ulysses": (2, 1, "pass_kv"),
    "Ulysses x pass-KV ring": (2, 2, "pass_kv"),
    "Ulysses x pass-Q ring": (2, 2, "pass_q"),
    "one exchange (decode)": (2, 2, None),
}


def solved(way: str, masked: Masked, task: Problem, kernel: Kernel, sinks: Tensor | None) -> list[list[Tensor]]:
    """By context rank, its rows of out, dq, dk and dv, and the sinks' gradient of its heads; of decode, out alone."""
    ulysses, ring, strategy = WAYS[way]

    def rank_main(world: ThreadWorld, rank: int) -> list[Tensor]:
        first, member = rank - rank % ulysses, rank % ulysses
        around = world.group(rank, range(member, world.size, ulysses))
        queries, keys = (layout.gathered(ulysses) for layout in (task.queries, task.keys))
        if strategy is None:
            return [met(masked.mask, task, kernel, world.group(rank), around.rank, ulysses)]
        mine = None if sinks is None else sinks.chunk(ulysses)[member].clone().requires_grad_()
        inner = ring_attention(Ring(around, queries, keys, masked.mask), kernel, STRATEGIES[strategy], mine)
        rows = [task.queries.rows(first + u) for u in range(ulysses)]
        outer = over_heads(world.group(rank, range(first, first + ulysses)), rows, inner)
        answers, _ = solve(outer, task, rank, lambda: around.traffic)
        return answers if mine is None else [*answers, mine.grad]

    return run_threads(ulysses * ring, rank_main)


def met(mask: Mask, task: Problem, kernel: Kernel, comm: Comm, at: int, ulysses: int) -> Tensor:
    """The last rows' answer, all of it on every rank: see `gather_merge`."""
    keys = task.keys.gathered(ulysses)
    q = share_of_heads(task.q, ulysses, comm.rank % ulysses)
    k, v = (share_of_heads(keys.shard(x, at, 1), ulysses, comm.rank % ulysses) for x in (task.k, task.v))
    seen = empty_partial(q)
    tiles = visible_tiles(task.queries.on_one_rank().ranks[0], keys.ranks[at], mask)
    attend_tiles(seen, q, k, v, tiles, kernel)
    return gather_merge(seen, comm, ulysses)


def with_sinks(task: Problem, mask: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv and the sinks' gradient, by autograd over a softmax with one more column, of value 0."""
    leaves = [x.double().requires_grad_() for x in (task.q, task.k, task.v, sinks)]
    q, k, v, extra = leaves
    sharing = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k.repeat_interleave(sharing, 2)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[None, :, None, :], -torch.inf)
    column = extra[None, None, :, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("bqhk,bkhd->bqhd", weights, v.repeat_interleave(sharing, 2))
    return out.detach(), *torch.autograd.grad(out, leaves, task.dout.double())


def exact(task: Problem, masked: Masked, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """out, dq, dk and dv of dense float64, and the sinks' gradient where there are any."""
    rows = oracle.packed(task.queries.lengths)
    mask = oracle.visible(rows, rows, masked.mask.before, masked.mask.after)
    if sinks is not None:
        return with_sinks(task, mask, sinks)
    return oracle.attention(task.q, task.k, task.v, mask)[0], *oracle.gradients(task.q, task.k, task.v, mask, task.dout)


def assert_exact(way: str, masked: Masked, kernel: Kernel, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    ulysses, ring, strategy = WAYS[way]
    layout = masked.layout(ring).split(ulysses)
    task = problem(layout, heads=heads, dtype=dtype)
    sinks = torch.randn(heads[0]).to(dtype) if masked.sinks else None
    answers, right = solved(way, masked, task, kernel, sinks), exact(task, masked, sinks)
    if strategy is None:
        for (out,) in answers:
            oracle.assert_close(out, right[0], TOLERANCE[dtype])
        return
    for parts, whole in zip(zip(*answers, strict=True), right, strict=False):
        if whole.dim() == 4:
            oracle.assert_close(layout.unshard(parts, dim=1), whole, TOLERANCE[dtype])
    if sinks is not None:
        by_member = [
            torch.stack([x[-1].double() for x in answers[member::ulysses]]).sum(0) for member in range(ulysses)
        ]
        # Each rank rounds its own rows' share.
        oracle.assert_close(torch.cat(by_member), right[-1], ring * TOLERANCE[dtype])


@cache
def row(way: str, name: str) -> str:
    """A line of the table; raises where a cell that it would call exact is not."""
    masked, cells = MASKS[name], []
    if masked.sinks and WAYS[way][2] is None:
        return f"| {way} | {name} |" + " not there |" * len(COLUMNS)
    for kernel, dtype in COLUMNS:
        for heads in GQA.values():
            assert_exact(way, masked, KERNELS[kernel], dtype, heads)
        cells.append(", ".join(map(str, GQA)))
    return f"| {way} | {name} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_every_cell_is_exact(way, name):
    """On every kernel of a CPU, in every dtype, for every number of query heads to a KV head."""
    assert row(way, name)


def test_the_table_says_what_was_run(pytestconfig):
    named = [f"{kernel} {str(dtype).removeprefix('torch.')}" for kernel, dtype in COLUMNS]
    lines = ["| way | mask | " + " | ".join(named) + " |", "|---" * (2 + len(named)) + "|"]
    lines += [row(way, name) for way in WAYS for name in MASKS]
    table = "\n".join(lines) + "\n"
    before, _, rest = TABLE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if pytestconfig.getoption("--write-table"):
        TABLE.write_text(before + BEGIN + table + END + after)
    assert TABLE.read_text() == before + BEGIN + table + END + after, "write it anew: --write-table"


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ON_CPU])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gpus_kernel_is_refused_on_a_cpu(name, dtype):
    task = problem(zigzag(7, 1), dtype=getattr(torch, dtype))
    with pytest.raises(
        ValueError, match=rf"kernel {name} takes bfloat16 or float16 on cuda, not .*use context.kernel=ref"
    ):
        ring_attention(Ring(ThreadWorld(1).group(0), task.queries, task.keys), KERNELS[name], STRATEGIES["pass_kv"])(
            task.q, task.k, task.v
        )
    with pytest.raises(
        ValueError, match=rf"context\.kernel={name} does not take {dtype} on cpu: use reference or flash"
    ):
        kernel_for(name, "cpu", dtype)


@pytest.mark.parametrize(
    ("asked", "words"), [("auto", "no fast kernel has been run"), ("flash_cpu", "use reference or flash_cuda")]
)
def test_what_has_not_run_on_a_gpu_is_not_taken_unasked(asked, words):
    with pytest.raises(ValueError, match=words):
        kernel_for(asked, "cuda", "bfloat16")


@pytest.mark.parametrize(
    ("heads", "changed", "words"),
    [
        ((6, 4), lambda q, k, v: (q, k, v), "6 query heads of 5 over 4 KV heads"),
        ((6, 2), lambda q, k, v: (q, k, v[..., :3]), "use heads of one width"),
        (
            (6, 2),
            lambda q, k, v: (q.int(), k, v),
            "not torch.int32 on cpu: use context.kernel=reference",
        ),
    ],
)
def test_what_no_kernel_has_been_tested_on_is_refused(heads, changed, words):
    task = problem(zigzag(7, 1), heads=heads)
    with pytest.raises(ValueError, match=words):
        KERNELS["reference"].refuse_untested(*changed(task.q, task.k, task.v))


def test_a_width_that_a_kernel_cannot_take_is_refused():
    task, eights = problem(zigzag(7, 1), d=5), replace(KERNELS["reference"], name="eights", width_step=8)
    with pytest.raises(ValueError, match="kernel eights takes heads of a multiple of 8, not 5"):
        eights.refuse_untested(task.q, task.k, task.v)
