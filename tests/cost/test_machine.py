"""Machines: cores that ranks share, slower links, rounded reductions, and a measured backward."""

from dataclasses import replace

import pytest

from longctx.config import Mesh
from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.cost.hardware import LayerRates, Link
from longctx.cost.machine import Level, Machine
from longctx.cost.step import StepWork, step_cost
from longctx.model_shape import ModelShape

SHAPE = ModelShape(5, 300, 12, 6, 30, 720, 4000, 4096, 1e-5, False, False)
LINK = Link(1e-4, 1e8)
MACHINE = Machine([Level("all", 8, LINK, LINK)], 8, 1e10, 1e11, 1e9, 2e9, 0.0, 1e-5, 1e-4, 1e-3)
NUMBERS = Numbers(4, 4)


def costs(machine, mesh):
    yield prefill_cost(SHAPE, mesh, machine, [96], [48], "pass_kv", NUMBERS)
    yield decode_cost(SHAPE, mesh, machine, [96], "gather_merge", NUMBERS)
    yield step_cost(SHAPE, mesh, machine, StepWork(96, 1), "pass_kv", NUMBERS)


@pytest.mark.parametrize(("ranks", "turns"), [(1, 1), (2, 1), (3, 1.5), (4, 2)])
def test_more_ranks_than_cores_take_turns(ranks, turns):
    """A rank's own work takes longer; messages do not."""
    for alone, shared in zip(
        costs(MACHINE, Mesh(ring=ranks)), costs(replace(MACHINE, ranks_at_once=2), Mesh(ring=ranks)), strict=True
    ):
        for part, seconds in shared.parts.items():
            own = part not in ("ring", "merge", "tp", "ulysses", "gradients", "experts")
            assert seconds == pytest.approx(alone.parts[part] * (turns if own else 1), abs=1e-12), part


def test_links_between_hosts_are_slower_and_never_faster():
    slow = MACHINE.with_links(1e-3, 1e7).levels[0]
    assert slow.hop == slow.exchange == slow.gather_link == Link(1.1e-3, 1e7)
    assert MACHINE.with_links(0.0, 1e12).levels[0].hop == LINK


def test_rounded_messages_are_shorter():
    """Two steps, each of 2 messages of a third of the bytes: 300 values in 5 groups of 64, with a scale of 2 bytes."""
    parts = {
        name: prefill_cost(SHAPE, Mesh(tp=3), MACHINE, [96], [0], "pass_kv", replace(NUMBERS, reduce=name)).parts
        for name in ("float32", "int8")
    }
    assert parts["int8"]["tp"] == pytest.approx(5 * 2 * 2 * (1e-4 + 2 * 96 * 5 * 66 / 3 / 1e8))
    assert parts["float32"]["tp"] == pytest.approx(5 * 2 * 4 * (1e-4 + 96 * 300 * 4 / 3 / 1e8))


def test_a_measured_backward_and_all_reduce_replace_the_arithmetic():
    slow = replace(MACHINE, block_s=0.0, backward=5.0)
    times = [step_cost(SHAPE, Mesh(), one, StepWork(96, 1), "pass_kv", NUMBERS) for one in (MACHINE, slow)]
    usual = replace(MACHINE, block_s=0.0)
    forward = step_cost(SHAPE, Mesh(), usual, StepWork(96, 1), "pass_kv", NUMBERS).parts["attention"] / 3.5
    assert times[1].parts["attention"] == pytest.approx(6 * forward)
    level = replace(MACHINE.levels[0], reduce=Link(2e-3, 1e6))
    assert replace(MACHINE, levels=[level]).all_reduce_seconds(3e6, 3) == pytest.approx(4 * (2e-3 + 1.0))


@pytest.mark.parametrize(
    ("name", "value"), [("backward", 0), ("peak_flops", 0), ("ranks_at_once", 0), ("block_s", -1e-6), ("turn_s", -1)]
)
def test_impossible_constants_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        replace(MACHINE, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("gemm_flops", 0), ("weight_bytes_per_s", 0), ("layer_s", -1e-6)])
def test_impossible_rates_of_a_layer_are_refused(name, value):
    with pytest.raises(ValueError, match=f"layer {name}={value}"):
        replace(LayerRates(1e10, 1e9, 0.0, LINK), **{name: value})
