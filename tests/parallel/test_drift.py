"""Numerical drift: in bfloat16, more ranks do not add error, because the partials between hops are float32.

The inputs are random tensors, and the attention inputs of a real model over real text.
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
from longctx.attention.partial import Partial
from longctx.config import Mesh, ModelSource, PromptSource
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.ring import Ring, Strategy
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.threads import run_threads
from recipes.bench.drift import capture_attention_inputs, in_bfloat16
from tests import oracle

ROWS, HEADS, WIDTH = 769, (6, 2), 64
RANKS = [1, 2, 3, 4, 8, 16, 32]
MAX_RATIO = 1.05  # error of many ranks, relative to the error of one

TOKENS = 1021  # prime like ROWS, so that the ranks' shares are uneven
LAYERS = [0, 15, 29]  # the model has 30

Inputs = tuple[Tensor, ...]


@cache
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, ROWS, heads, WIDTH) for heads in (HEADS[0], HEADS[1], HEADS[1])]
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


@cache
def exact_output() -> Tensor:
    return dense(inputs())


def dense(of: Inputs) -> Tensor:
    rows = oracle.pack_rows([of[0].shape[1]])
    return oracle.attention(*of, oracle.visible(rows, rows))[0]


def relative_error(of: Inputs, exact: Tensor, strategy: Strategy, ranks: int, kernel: Kernel) -> float:
    """Return the error of the whole output in bfloat16, relative to ``exact`` in float64."""
    layout = zigzag(of[0].shape[1], ranks)

    def rank_main(world, rank):
        q, k, v = (layout.shard(x, rank, 1) for x in of)
        return strategy(q, k, v, Ring(world.group(rank), layout, layout), kernel).out

    out = layout.unshard(run_threads(ranks, rank_main), 1)
    return float((out.bfloat16().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", RANKS)
def test_error_does_not_grow_with_ranks(strategy, ranks):
    one = relative_error(inputs(), exact_output(), STRATEGIES["pass_kv"], 1, flash_cpu)
    assert relative_error(inputs(), exact_output(), STRATEGIES[strategy], ranks, flash_cpu) <= MAX_RATIO * one


def test_error_grows_with_bfloat16_partials():
    """The test above can fail."""
    one = relative_error(inputs(), exact_output(), STRATEGIES["pass_kv"], 1, flash_cpu)
    assert relative_error(inputs(), exact_output(), STRATEGIES["pass_kv"], 8, in_bfloat16(flash_cpu)) > MAX_RATIO * one


def forward_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """Return a tile's attention as torch's op computes it in bfloat16: its output is bfloat16, its lse float32."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal)
    return Partial(out.transpose(1, 2).float(), lse.transpose(1, 2))


@pytest.mark.parametrize("scale", [1, 5])
def test_error_grows_with_ranks_if_tiles_are_computed_in_bfloat16(scale):
    """This is why `flash_cpu` computes in float32, although the op takes bfloat16.  ``scale`` sharpens the softmax."""
    q, k, v = inputs()
    of, kernel = (q * scale, k, v), replace(flash_cpu, forward=forward_in_bfloat16)
    one, four = (relative_error(of, dense(of), STRATEGIES["pass_kv"], ranks, kernel) for ranks in (1, 4))
    assert four > MAX_RATIO * one


def capture_inputs(rank: Rank, model: ModelSource, folder: Path, tokens: list[int]) -> dict[int, Inputs]:
    """Return the attention inputs of `LAYERS` in bfloat16: queries and keys after rotary embedding, and values."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, Mesh()) as runtime:
        engine = load_engine(runtime, model, shape_of(folder), folder, "auto")
        return capture_attention_inputs(engine, torch.tensor(tokens), LAYERS)


@pytest.fixture(scope="module")
def activations(smollm2: tuple[ModelSource, Path]) -> dict[int, tuple[Inputs, Tensor, float]]:
    """By layer: its attention inputs over Python's language reference, the exact output, and the error of one rank."""
    model, folder = smollm2
    tokens, _ = prompt_tokens(PromptSource(pydoc="all", tokens=TOKENS), tokenizer_of(folder))
    inputs_by_layer = run_ranks(1, capture_inputs, replace(model, dtype="bfloat16"), folder, tokens)[0]
    result = {}
    for layer, of in inputs_by_layer.items():
        assert [(x.dtype, tuple(x.shape[1:])) for x in of] == [
            (torch.bfloat16, (TOKENS, heads, 64)) for heads in (9, 3, 3)
        ]
        exact = dense(of)
        result[layer] = (of, exact, relative_error(of, exact, STRATEGIES["pass_kv"], 1, flash_cpu))
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_error_does_not_grow_with_ranks_on_a_real_models_activations(activations, layer, strategy):
    of, exact, one = activations[layer]
    errors = {ranks: relative_error(of, exact, STRATEGIES[strategy], ranks, flash_cpu) for ranks in (1, 2, 8, 32)}
    assert max(errors.values()) <= MAX_RATIO * one, errors


@pytest.mark.parametrize("layer", LAYERS)
def test_error_grows_on_a_real_models_activations_with_bfloat16_partials(activations, layer):
    of, exact, one = activations[layer]
    assert relative_error(of, exact, STRATEGIES["pass_kv"], 2, in_bfloat16(flash_cpu)) > MAX_RATIO * one
