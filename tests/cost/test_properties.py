"""The inequalities of arXiv 2411.01783 follow from the costs, and better machines are never slower."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longctx.config import Mesh
from longctx.cost.attention import COSTS, Work, block_seconds, pass_kv_cost, pass_q_cost
from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.cost.hardware import Hardware, Link
from longctx.cost.machine import Level, Machine
from longctx.cost.step import StepWork, step_cost
from longctx.model_shape import ModelShape

heads = st.sampled_from([(16, 1), (8, 2), (12, 3), (5, 5)])
tokens = st.integers(1, 10**6)
rates = st.floats(1e8, 1e13)


# Numbers of a ring: new and cached tokens, ranks, heads, FLOP/s, bytes/s.
rings = st.tuples(tokens, st.integers(0, 10**6), st.integers(2, 9), heads, st.floats(1e9, 1e16), rates)


def ideal(ring):
    """Return the work of a ring and an ideal machine: no latency, full overlap, one bandwidth, 16-bit partials."""
    new, cached, ranks, (q, kv), flops, rate = ring
    link = Link(0.0, rate)
    return Work((new,), (cached,), ranks, q, kv, 64, 2, None, 2), Hardware(flops, 1e30, 0.0, link, link, overlap=1.0)


@given(rings)
def test_eq_1_queries_are_smaller_below_the_miss_rate(ring):
    work, _ = ideal(ring)
    miss, limit = work.new_total / work.total, 2 * work.kv_heads / work.heads
    assume(miss != pytest.approx(limit))
    assert (work.q_block_bytes < work.kv_block_bytes) == (miss < limit)


@given(rings)
def test_eq_2_enough_new_tokens_hide_the_ring_of_keys(ring):
    """The paper counts all T (T + P) pairs; under a causal mask at least half of them are visible."""
    work, hardware = ideal(ring)
    limit = work.ranks * hardware.flops * work.kv_heads * 2 / (2 * work.heads * hardware.hop.bytes_per_s)
    exposed = pass_kv_cost(work, hardware).exposed_s / pass_kv_cost(work, hardware).seconds
    if work.new_total >= 2 * limit:
        assert exposed == pytest.approx(0, abs=1e-9)
    if work.new_total < 0.99 * limit:
        assert exposed > 0


@given(rings)
def test_eq_3_enough_tokens_hide_the_ring_of_queries(ring):
    work, hardware = ideal(ring)
    limit = work.ranks * 2 * hardware.flops / (4 * hardware.hop.bytes_per_s)
    cost = pass_q_cost(work, hardware)
    exposed = (cost.exposed_s - hardware.exchange.seconds(work.partial_bytes)) / cost.seconds
    if work.total >= 2 * limit:
        assert exposed == pytest.approx(0, abs=1e-9)
    if work.total < 0.99 * limit:
        assert exposed > 0


@given(rings)
def test_eq_5_pass_q_wins_below_the_refined_miss_rate(ring):
    work, hardware = ideal(ring)
    block, rate, n = block_seconds(work, hardware), hardware.hop.bytes_per_s, work.ranks
    assume(block >= hardware.hop.seconds(work.q_block_bytes))  # Eq. 5 assumes that pass-Q's ring is hidden
    refined = 2 * work.kv_heads / work.heads - 4 * work.new_total * rate / (n * hardware.flops * 2)
    if work.new_total / work.total * 65 / 64 < refined * (1 - 1e-9):
        assert pass_q_cost(work, hardware).seconds <= pass_kv_cost(work, hardware).seconds * (1 + 1e-9)


SHAPE = ModelShape(6, 96, 12, 6, 16, 384, 1009, 10**7, 1e-5, False, False, (), windows=(None, 61) * 3)
meshes = st.builds(Mesh, *(st.sampled_from(sizes) for sizes in ((1, 2, 3), (1, 2), (1, 2, 5), (1, 2), (1, 2, 3))))


def machine(rate=1e10, latency=1e-5, flops=1e13, memory=1e12, overlap=0.5):
    near, far = (Link(latency, rate * factor) for factor in (10, 1))
    levels = [Level("near", 4, near, near), Level("far", 2**20, far, far)]
    return Machine(levels, 4, flops, flops, memory, memory, overlap, 1e-5, 1e-4, 1e-5)


def all_costs(mesh, one, new, cached, share=0.0, shape=SHAPE):
    numbers = Numbers(2, 2, share)
    inference = replace(mesh, dp=1, pp=1)
    for strategy in COSTS:
        yield prefill_cost(shape, inference, one, [new], [cached], strategy, numbers).seconds
        yield decode_cost(shape, inference, one, [cached], strategy, numbers).seconds
        yield step_cost(shape, mesh, one, StepWork(new, 6), strategy, numbers).seconds
    yield decode_cost(shape, inference, one, [cached], "gather_merge", numbers).seconds


def never_more(less, more):
    return all(a <= b * (1 + 1e-9) for a, b in zip(less, more, strict=True))


@settings(max_examples=15)
@given(meshes, tokens, tokens, st.floats(1, 100))
def test_better_machines_are_never_slower(mesh, new, cached, factor):
    before = list(all_costs(mesh, machine(), new, cached))
    better = (
        machine(rate=1e10 * factor), machine(latency=1e-5 / factor), machine(flops=1e13 * factor),
        machine(memory=1e12 * factor), machine(overlap=1 - 0.5 / factor),
    )  # fmt: skip
    for one in better:
        assert never_more(all_costs(mesh, one, new, cached), before)


@settings(max_examples=15)
@given(meshes, tokens, tokens, st.floats(0, 1))
def test_more_work_is_never_faster_and_dropped_reductions_never_slower(mesh, new, cached, share):
    """More work without windows only: in longer chunks, a window may reach fewer other chunks."""
    whole = replace(SHAPE, windows=())
    less, more = ((new, cached), (new + 7, cached + 11))
    assert never_more(*(all_costs(mesh, machine(), *each, shape=whole) for each in (less, more)))
    before = list(all_costs(mesh, machine(), new, cached))
    assert never_more(all_costs(mesh, machine(), new, cached, share), before)
