"""The SPD layer: not dropped, equal to megatron-core's layer; dropped, equal to the paper's equations in float64."""

import math

import pytest
import torch
from torch import Tensor

from longctx.parallel.launch import run_ranks
from tests.megatron.spd.spd_ranks import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, B, S, run_layer, unshard, weights
from tests.oracle import assert_close


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attention_of(x: Tensor, w: dict[str, Tensor], groups: range) -> Tensor:
    """Return the partial attention output of the heads in these KV groups, without bias; x is [s b hidden]."""
    qkv = w["self_attention.linear_qkv.weight"].unflatten(0, (KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM))
    bias = w.get("self_attention.linear_qkv.bias", torch.zeros(qkv.shape[:3].numel(), dtype=x.dtype))
    bias = bias.unflatten(0, qkv.shape[:3])
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    partial = torch.zeros(S, B, HIDDEN, dtype=x.dtype)
    for group in groups:
        *queries, key, value = (x @ qkv[group, i].T + bias[group, i] for i in range(HEADS // KV_HEADS + 2))
        for i, query in enumerate(queries):
            scores = torch.einsum("qbd,kbd->bqk", query, key) / math.sqrt(HEAD_DIM)
            attended = torch.einsum("bqk,kbd->qbd", scores.masked_fill(future, -math.inf).softmax(-1), value)
            head = group * (HEADS // KV_HEADS) + i
            partial = (
                partial
                + attended @ w["self_attention.linear_proj.weight"][:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T
            )
    return partial


def mlp_of(x: Tensor, w: dict[str, Tensor], neurons: slice) -> Tensor:
    gate, up = w["mlp.linear_fc1.weight"].chunk(2)
    gate_bias, up_bias = w.get("mlp.linear_fc1.bias", torch.zeros(2 * FFN, dtype=x.dtype)).chunk(2)
    gated = torch.nn.functional.silu(x @ gate[neurons].T + gate_bias[neurons])
    return (gated * (x @ up[neurons].T + up_bias[neurons])) @ w["mlp.linear_fc2.weight"][:, neurons].T


def dropped_block(x: Tensor, w: dict[str, Tensor], tp: int, norms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the output of a dropped block (arXiv 2502.20727, 4.1); ``norms`` has every rank's two norm weights."""
    bias = w.get("self_attention.linear_proj.bias", torch.zeros(HIDDEN, dtype=x.dtype))
    out = x + bias + w.get("mlp.linear_fc2.bias", torch.zeros(HIDDEN, dtype=x.dtype))
    for rank, (first, second) in enumerate(norms):
        groups = range(rank * KV_HEADS // tp, (rank + 1) * KV_HEADS // tp)
        partial = attention_of(rms(x, first), w, groups)
        neurons = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
        out = out + partial + mlp_of(rms(x + partial + bias, second), w, neurons)
    return out


def oracle(tp: int, biases: bool) -> tuple[Tensor, Tensor, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the output and the gradients of x, of the weights, and of every rank's pair of norms.

    The gradient of a replicated norm is the sum of the ranks' gradients.
    """
    generator = torch.Generator().manual_seed(29)
    x, out_gradient = torch.randn(2, S, B, HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    w = {name: weight.requires_grad_() for name, weight in weights(biases).items()}
    replicated = w.pop("input_layernorm.weight"), w.pop("pre_mlp_layernorm.weight")
    norms = [tuple(norm.detach().clone().requires_grad_() for norm in replicated) for _ in range(tp)]
    out = dropped_block(x, w, tp, norms)
    out.backward(out_gradient)
    return out.detach(), x.grad, {n: p.grad for n, p in w.items()}, [tuple(p.grad for p in pair) for pair in norms]


def dropped_block_with_output_norms(x: Tensor, w: dict[str, Tensor], tp: int) -> Tensor:
    """Return the output of a dropped block that normalises the outputs of attention and MLP (docs/results/spd.md)."""

    def norm(x: Tensor, module: str) -> Tensor:
        return rms(x, w[f"{module}.weight"]) if f"{module}.weight" in w else x

    partials, outputs = [], []
    for rank in range(tp):
        groups = range(rank * KV_HEADS // tp, (rank + 1) * KV_HEADS // tp)
        partials.append(attention_of(norm(x, "input_layernorm"), w, groups))
        seen = x + norm(partials[-1], "self_attention.linear_proj.norm")
        neurons = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
        outputs.append(mlp_of(norm(seen, "pre_mlp_layernorm"), w, neurons))
    return x + norm(sum(partials), "self_attention.linear_proj.norm") + norm(sum(outputs), "mlp.linear_fc2.norm")


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_layer_that_does_not_drop_equals_the_stock_layer(tp: int, sequence_parallel: bool) -> None:
    stock, spd = (run_ranks(tp, run_layer, tp, kind, True, sequence_parallel) for kind in ("stock", "spd"))
    for stock_rank, spd_rank in zip(stock, spd, strict=True):
        assert_close(spd_rank["out"], stock_rank["out"], 1e-14)
        assert_close(spd_rank["x"], stock_rank["x"], 1e-14)
        assert spd_rank["forward"] == stock_rank["forward"] and spd_rank["backward"] == stock_rank["backward"]
        for name, gradient in stock_rank["gradients"].items():
            assert_close(spd_rank["gradients"][name], gradient, 1e-14)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_dropped_layer_equals_the_equations_of_the_paper(tp: int, sequence_parallel: bool, biases: bool) -> None:
    ranks = run_ranks(tp, run_layer, tp, "dropped", biases, sequence_parallel)
    out, x, gradients, norms = oracle(tp, biases)
    join_rows = torch.cat if ranks[0]["rows_sharded"] else (lambda parts: parts[-1])
    assert_close(join_rows([rank["out"] for rank in ranks]), out, 1e-12)
    assert_close(join_rows([rank["x"] for rank in ranks]), x, 1e-12)
    for name, gradient in gradients.items():
        assert_close(unshard(name, [rank["gradients"][name] for rank in ranks]), gradient, 1e-12)
    for name, of_ranks in zip(
        ("input_layernorm.weight", "pre_mlp_layernorm.weight"), zip(*norms, strict=True), strict=True
    ):
        assert_close(unshard(name, [rank["gradients"][name] for rank in ranks]), sum(of_ranks), 1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
def test_own_norms_have_each_ranks_gradient(sequence_parallel: bool) -> None:
    ranks = run_ranks(3, run_layer, 3, "dropped", True, sequence_parallel, True)
    _, x, _, norms = oracle(3, True)
    join_rows = torch.cat if ranks[0]["rows_sharded"] else (lambda parts: parts[-1])
    assert_close(join_rows([rank["x"] for rank in ranks]), x, 1e-12)
    for rank, (first, second) in zip(ranks, norms, strict=True):
        assert_close(rank["gradients"]["input_layernorm.weight"], first, 1e-12)
        assert_close(rank["gradients"]["pre_mlp_layernorm.weight"], second, 1e-12)


def test_dropped_layer_reduces_once_instead_of_twice() -> None:
    stock, spd = (run_ranks(3, run_layer, 3, kind, False, False) for kind in ("stock", "dropped"))
    size = S * B * HIDDEN * 8
    for stock_rank, spd_rank in zip(stock, spd, strict=True):
        assert stock_rank["forward"] == {"all_reduce": 2} and stock_rank["forward_bytes"] == {"all_reduce": 2 * size}
        assert spd_rank["forward"] == {"all_reduce": 1} and spd_rank["forward_bytes"] == {"all_reduce": size}
        # Backward reduces the gradient of x, and of each norm's weight (a vector).
        assert stock_rank["backward"] == {"all_reduce": 2} and spd_rank["backward"] == {"all_reduce": 3}


def test_dropped_layer_gathers_and_scatters_once_with_sequence_parallelism() -> None:
    stock, spd = (run_ranks(3, run_layer, 3, kind, False, True) for kind in ("stock", "dropped"))
    for stock_rank, spd_rank in zip(stock, spd, strict=True):
        assert stock_rank["forward"] == {"all_gather": 2, "reduce_scatter": 2}
        assert spd_rank["forward"] == {"all_gather": 1, "reduce_scatter": 1}
        # The stock layer's backward gathers once more for the gradient of each of its two column-parallel weights.
        assert stock_rank["backward"] == {"all_gather": 4, "reduce_scatter": 2}
        assert spd_rank["backward"] == {"all_gather": 1, "reduce_scatter": 1}


@pytest.mark.parametrize(("norms", "tp", "sequence_parallel"), [("sandwich", 3, True), ("post", 2, False)])
def test_dropped_layer_with_output_norms_equals_its_equations(norms: str, tp: int, sequence_parallel: bool) -> None:
    """One reduction instead of two carries as many bytes as the two of the stock layer."""
    stock, ranks = (
        run_ranks(tp, run_layer, tp, kind, False, sequence_parallel, False, norms) for kind in ("stock", "dropped")
    )
    generator = torch.Generator().manual_seed(29)
    x, out_gradient = torch.randn(2, S, B, HIDDEN, generator=generator, dtype=torch.float64)
    w = {name: weight.requires_grad_() for name, weight in weights(False, norms).items()}
    out = dropped_block_with_output_norms(x.requires_grad_(), w, tp)
    out.backward(out_gradient)
    join_rows = torch.cat if sequence_parallel else (lambda parts: parts[-1])
    assert_close(join_rows([rank["out"] for rank in ranks]), out.detach(), 1e-12)
    assert_close(join_rows([rank["x"] for rank in ranks]), x.grad, 1e-12)
    for name, weight in w.items():
        assert_close(unshard(name, [rank["gradients"][name] for rank in ranks]), weight.grad, 1e-12)
    for stock_rank, rank in zip(stock, ranks, strict=True):
        reduction = "reduce_scatter" if sequence_parallel else "all_reduce"
        assert (stock_rank["forward"][reduction], rank["forward"][reduction]) == (2, 1)
        assert stock_rank["forward_bytes"][reduction] == rank["forward_bytes"][reduction] == 2 * S * B * HIDDEN * 8
