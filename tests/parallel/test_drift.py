"""The drift certificate: in bfloat16 more ranks do not add error, because what adds up between hops is float32.

On random inputs, and on what a real model feeds its attention over real text.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel
from longctx.attention.layout import zigzag
from longctx.config import Mesh, ModelSource, PromptSource
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.threads import run_threads
from recipes.bench.drift import captured, in_bfloat16
from tests import oracle

ROWS, HEADS, WIDTH = 769, (6, 2), 64
RANKS = [1, 2, 3, 4, 8, 16, 32]
AIM = 1.05

TOKENS = 1021  # prime, as ROWS is: no rank has an even share
LAYERS = [0, 15, 29]  # of 30

Inputs = tuple[Tensor, ...]


@cache
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, ROWS, heads, WIDTH) for heads in (HEADS[0], HEADS[1], HEADS[1])]
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


@cache
def exact() -> Tensor:
    return dense(inputs())


def dense(of: Inputs) -> Tensor:
    rows = oracle.pack_rows([of[0].shape[1]])
    return oracle.attention(*of, oracle.visible(rows, rows))[0]


def error(of: Inputs, right: Tensor, strategy: Strategy, ranks: int, kernel: Kernel) -> float:
    """Of the whole output, in the model's dtype, relative to float64."""
    layout = zigzag(of[0].shape[1], ranks)

    def rank_main(world, rank):
        q, k, v = (layout.shard(x, rank, 1) for x in of)
        return strategy(q, k, v, Ring(world.group(rank), layout, layout), kernel).out

    out = layout.unshard(run_threads(ranks, rank_main), 1)
    return float((out.bfloat16().double() - right).norm() / right.norm())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", RANKS)
def test_error_does_not_grow_with_ranks(strategy, ranks):
    one = error(inputs(), exact(), STRATEGIES["pass_kv"], 1, flash_cpu)
    assert error(inputs(), exact(), STRATEGIES[strategy], ranks, flash_cpu) <= AIM * one


def test_it_does_where_partials_are_kept_in_bfloat16():
    """The certificate can be refused."""
    one = error(inputs(), exact(), STRATEGIES["pass_kv"], 1, flash_cpu)
    assert error(inputs(), exact(), STRATEGIES["pass_kv"], 8, in_bfloat16(flash_cpu)) > AIM * one


def read(rank: Rank, model: ModelSource, folder: Path, tokens: list[int]) -> dict[int, Inputs]:
    """What `LAYERS` hand their attention: queries and keys after rotary, values, in bfloat16."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime

    with runtime(rank, Mesh()) as here:
        engine = load_engine(here, model, shape_of(folder), folder, "auto")
        return captured(engine, torch.tensor(tokens), LAYERS)


@pytest.fixture(scope="module")
def activations(smollm2: tuple[ModelSource, Path]) -> dict[int, tuple[Inputs, Tensor, float]]:
    """By layer: what the model hands it over Python's language reference, the exact answer, one rank's error."""
    model, folder = smollm2
    tokens, _ = prompt_tokens(PromptSource(pydoc="all", tokens=TOKENS), tokenizer_of(folder))
    kept = run_ranks(1, read, replace(model, dtype="bfloat16"), folder, tokens)[0]
    found = {}
    for layer, of in kept.items():
        assert [(x.dtype, tuple(x.shape[1:])) for x in of] == [
            (torch.bfloat16, (TOKENS, heads, 64)) for heads in (9, 3, 3)
        ]
        right = dense(of)
        found[layer] = (of, right, error(of, right, STRATEGIES["pass_kv"], 1, flash_cpu))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_error_does_not_grow_with_ranks_on_a_real_models_activations(activations, layer, strategy):
    of, right, one = activations[layer]
    errors = {ranks: error(of, right, STRATEGIES[strategy], ranks, flash_cpu) for ranks in (1, 2, 8, 32)}
    assert max(errors.values()) <= AIM * one, errors


@pytest.mark.parametrize("layer", LAYERS)
def test_it_does_on_a_real_models_activations_where_partials_are_kept_in_bfloat16(activations, layer):
    of, right, one = activations[layer]
    assert error(of, right, STRATEGIES["pass_kv"], 2, in_bfloat16(flash_cpu)) > AIM * one
