"""The cost of a decode step by sharded and by gather_merge, checked by hand, and the choice between them."""

from dataclasses import replace

import pytest

from longctx.config import Mesh
from longctx.cost.decode import (
    DecodeHardware,
    DecodeWork,
    choose_decode,
    exchanges,
    gather_merge_seconds,
    sharded_seconds,
)
from longctx.cost.forward import Numbers, decode_cost, decode_work
from longctx.cost.hardware import Link
from longctx.cost.machine import Level, Machine
from longctx.model_shape import ModelShape

HARDWARE = DecodeHardware(weight_bytes_per_s=1e9, flops=1e10, exchange=Link(latency_s=1e-4, bytes_per_s=1e8))
WORK = DecodeWork(
    batch=3, ranks=2, layers=5, layer_weights=7_000_000, layer_bytes=14_000_000, head_weights=1_000_000, hidden=300,
    heads=10, kv_heads=2, head_dim=30, vocab_size=4000, element_bytes=2,
)  # fmt: skip


def test_seconds_by_hand():
    """Reading 7e6 weights of 2 bytes takes 14 ms, and 3 rows of them 4.2 ms of arithmetic."""
    partial = 1e-4 + 3 * 10 * 31 * 4 / 1e8
    assert gather_merge_seconds(WORK, HARDWARE) == pytest.approx(5 * (14e-3 + partial) + 2e-3)
    qkv, share = 1e-4 + 3 * 2 * 14 * 30 / 2 / 1e8, 1e-4 + 3 * 10 * 31 * 4 / 2 / 1e8
    hidden, logits = 1e-4 + 3 * 2 * 300 / 1e8, 1e-4 + 3 * 2 * 4000 / 2 / 1e8
    assert sharded_seconds(WORK, HARDWARE) == pytest.approx(5 * (7e-3 + qkv + share + 2 * hidden) + 1e-3 + logits)


def test_large_batches_are_bound_by_arithmetic():
    """101 rows of 7e6 weights are 1.414 GFLOP: 141.4 ms.  Each of two ranks computes the logits of at most 51 rows."""
    busy = replace(WORK, batch=101)
    partial = 1e-4 + 101 * 10 * 31 * 4 / 1e8
    assert gather_merge_seconds(busy, HARDWARE) == pytest.approx(5 * (141.4e-3 + partial) + 10.2e-3)
    assert gather_merge_seconds(busy, replace(HARDWARE, flops=1e11)) < 5 * 30e-3


@pytest.mark.parametrize(
    ("change", "latency", "expected"),
    [
        ({}, 1e-4, "sharded"),
        ({}, 3e-3, "gather_merge"),  # three more exchanges take longer than half of the weights
        ({"layer_weights": 50_000, "layer_bytes": 100_000, "head_weights": 0}, 1e-4, "gather_merge"),
        ({"ranks": 1}, 0.0, "gather_merge"),
    ],
)
def test_choice_weighs_exchanges_against_weights(change, latency, expected):
    hardware = replace(HARDWARE, exchange=Link(latency, 1e8))
    strategy, why = choose_decode(replace(WORK, **change), hardware)
    assert strategy == expected
    assert "ms" in why or "one context rank" in why


@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ulysses=2, ring=3)], ids=str)
def test_plans_have_the_seconds_that_auto_compares(mesh):
    """The times of the two strategies differ in a plan as they do in the choice; both have the same attention."""
    shape = ModelShape(5, 300, 10, 2, 30, 700, 4000, 4096, 1e-5, False, False)
    link = Link(1e-4, 1e8)
    one = Machine([Level("all", 8, link, link)], 8, 1e10, 1e11, 1e9, 2e9, 0.5, 1e-5, 1e-4, 1e-3)
    numbers, cached = Numbers(2, 2), [70, 90, 81]
    work = decode_work(shape, mesh, len(cached), numbers)
    costs = {name: decode_cost(shape, mesh, one, cached, name, numbers) for name in ("sharded", "gather_merge")}
    apart = sharded_seconds(work, HARDWARE) - gather_merge_seconds(work, HARDWARE)
    assert costs["sharded"].seconds - costs["gather_merge"].seconds == pytest.approx(apart)
    assert costs["sharded"].parts["attention"] == costs["gather_merge"].parts["attention"] > 0
    assert costs["sharded"].parts["weights"] * mesh.context == pytest.approx(costs["gather_merge"].parts["weights"])


def test_a_window_is_read_by_the_rank_that_has_it():
    """The last 16 of 96 keys are on one of 3 ranks; without a window, each rank reads 32."""
    shape = ModelShape(6, 300, 10, 2, 30, 700, 4000, 4096, 1e-5, False, False, windows=(16, None) * 3)
    link = Link(1e-4, 1e8)
    one = Machine([Level("all", 8, link, link)], 8, 1e30, 1e30, 1e30, 1e9, 0.0, 0.0, 0.0, 0.0)
    cost = decode_cost(shape, Mesh(ring=3), one, [95], "gather_merge", Numbers(2, 2))
    assert cost.parts["attention"] == pytest.approx(3 * (16 + 32) * 2 * 2 * 30 * 2 / 1e9)


def test_tensor_parallel_ranks_take_part_in_the_sums_of_hidden_states():
    """On tp=2 ring=2, a rank sends 3 parts of each sum; by gather_merge, one part to the other tp rank."""
    work = replace(WORK, tp=2)
    sums = dict(exchanges(work, "sharded"))
    assert sums[10] == 3 * 3 * 2 * 300
    assert gather_merge_seconds(work, HARDWARE) - gather_merge_seconds(WORK, HARDWARE) == pytest.approx(
        10 * (1e-4 + 3 * 2 * 300 / 1e8)
    )
    with pytest.raises(ValueError, match="strategy=pass_kv has no formula here: use gather_merge, sharded"):
        list(exchanges(WORK, "pass_kv"))
