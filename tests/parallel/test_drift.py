"""The drift certificate: in bfloat16 more ranks do not add error, because what adds up between hops is float32."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel
from longctx.attention.layout import zigzag
from longctx.attention.partial import Partial
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.threads import run_threads
from tests import oracle

ROWS, HEADS, WIDTH = 769, (6, 2), 64
RANKS = [1, 2, 3, 4, 8, 16, 32]
AIM = 1.05


@cache
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, ROWS, heads, WIDTH) for heads in (HEADS[0], HEADS[1], HEADS[1])]
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


@cache
def exact() -> torch.Tensor:
    rows = oracle.packed([ROWS])
    return oracle.attention(*inputs(), oracle.visible(rows, rows))[0]


def error(strategy: Strategy, ranks: int, kernel: Kernel, cast: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Of the whole output, ``cast`` to what the model gets, relative to float64."""
    layout = zigzag(ROWS, ranks)

    def rank_main(world, rank):
        q, k, v = (layout.shard(x, rank, 1) for x in inputs())
        return strategy(q, k, v, Ring(world.group(rank), layout, layout), kernel).out

    out = layout.unshard(run_threads(ranks, rank_main), 1)
    return float((cast(out).double() - exact()).norm() / exact().norm())


def in_bfloat16(kernel: Kernel) -> Kernel:
    """``kernel``, whose answers are rounded as if they travelled and added up in the model's dtype."""

    def forward(*given: torch.Tensor | bool) -> Partial:
        part = kernel.forward(*given)
        return Partial(part.out.bfloat16().float(), part.lse.bfloat16().float())

    return replace(kernel, forward=forward)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", RANKS)
def test_error_does_not_grow_with_ranks(strategy, ranks):
    one = error(STRATEGIES["pass_kv"], 1, flash_cpu, torch.Tensor.bfloat16)
    assert error(STRATEGIES[strategy], ranks, flash_cpu, torch.Tensor.bfloat16) <= AIM * one


def test_it_does_where_partials_are_kept_in_bfloat16():
    """The certificate can be refused."""
    one = error(STRATEGIES["pass_kv"], 1, flash_cpu, torch.Tensor.bfloat16)
    assert error(STRATEGIES["pass_kv"], 8, in_bfloat16(flash_cpu), torch.Tensor.bfloat16) > AIM * one
