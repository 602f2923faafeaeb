"""Machines: cores that ranks share, slower links, rounded reductions, and a measured backward."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import yaml

from longctx.attention.layout import zigzag
from longctx.attention.tiles import CAUSAL, Mask, visible_tiles
from longctx.config import Mesh
from longctx.cost.attention import Work, block_seconds
from longctx.cost.forward import Numbers, decode_cost, layer_weights, prefill_cost
from longctx.cost.hardware import Hardware, LayerRates, Link, TrainRates
from longctx.cost.machine import TURN_S, Level, Machine
from longctx.cost.machine_file import machine_of
from longctx.cost.step import StepWork, step_cost
from longctx.model_shape import ModelShape
from recipes.common.overrides import CONFIGS

SHAPE = ModelShape(5, 300, 12, 6, 30, 720, 4000, 4096, 1e-5, False, False)
LINK = Link(1e-4, 1e8)
MACHINE = Machine([Level("all", 8, LINK, LINK)], 8, 1e10, 1e11, 1e9, 2e9, 0.0, 1e-5, 1e-4, 1e-3)
NUMBERS = Numbers(4, 4)
TRAINING = {"backward": 2, "gradient_s": 0, "update_s": 0, "loss_s": 0}
KERNEL = Hardware(1e9, 1e12, 1e-5, LINK, LINK, 0.0)


def costs(machine, mesh):
    yield prefill_cost(SHAPE, mesh, machine, [96], [48], "pass_kv", NUMBERS)
    yield decode_cost(SHAPE, mesh, machine, [96], "gather_merge", NUMBERS)
    yield step_cost(SHAPE, mesh, machine, StepWork(96, 1), "pass_kv", NUMBERS)


def decode_costs(machine, mesh):
    for strategy in ("gather_merge", "sharded", "pass_q"):
        yield decode_cost(SHAPE, mesh, machine, [96], strategy, NUMBERS)


@pytest.mark.parametrize("make", [lambda n: Mesh(ring=n), lambda n: Mesh(tp=n)], ids=["ring", "tp"])
@pytest.mark.parametrize(("ranks", "turns"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_more_ranks_than_cores_take_turns(ranks, turns, make):
    """A rank's own work takes longer, of three as of four: two wait for the third.

    Messages are late, except those of decoding.
    """
    late = replace(MACHINE, levels=[MACHINE.levels[0].later(TURN_S if turns > 1 else 0.0)])
    mesh, two = make(ranks), replace(MACHINE, ranks_at_once=2)
    prefill, _, step = costs(late, mesh)
    decodes = [[*decode_costs(machine, mesh)] for machine in (MACHINE, two)]
    shared_prefill, _, shared_step = costs(two, mesh)
    pairs = [(prefill, shared_prefill), (step, shared_step), *zip(*decodes, strict=True)]
    for alone, shared in pairs:
        for part, seconds in shared.parts.items():
            own = part not in ("ring", "merge", "tp", "ulysses", "gradients", "experts")
            assert seconds == pytest.approx(alone.parts[part] * (turns if own else 1), abs=1e-12), part


def test_late_links():
    """All messages but those of decoding have more latency; their rates are the same."""
    bulk, gather = Link(2.0, 5e9), Link(0.5, 7e9)
    level = Level("all", 8, Link(1.0, 1e9, bulk), Link(3.0, 2e9), step_s=0.25, gather=gather, reduce=Link(4.0, 3e9))
    late = level.later(10.0)
    assert (late.hop, late.exchange) == (Link(11.0, 1e9, Link(12.0, 5e9)), Link(13.0, 2e9))
    assert (late.step_s, late.gather, late.reduce) == (10.25, gather, Link(14.0, 3e9))
    plain = Level("all", 8, Link(1.0, 1e9), Link(3.0, 2e9)).later(10.0)
    assert (plain.step_s, plain.gather, plain.reduce) == (None, None, None)


def two_levels(near, far):
    """Return a machine of nodes of 8 GPUs, with the links ``near`` within a node and ``far`` between nodes."""
    return replace(MACHINE, levels=[Level("node", 8, near, near), Level("between", 2**20, far, far)])


def groups_of(world, ranks, stride):
    """List the groups of ``ranks`` ranks with numbers ``stride`` apart, among ``world`` ranks."""
    blocks = range(0, world, ranks * stride)
    return [range(block + first, block + ranks * stride, stride) for block in blocks for first in range(stride)]


@pytest.mark.parametrize("world", [1, 2, 6, 8, 9, 10, 12, 16, 20, 24, 48])
def test_a_group_has_the_links_of_the_nodes_that_it_lies_in(world):
    """The slowest group of an axis counts: with 3 GPUs in each, the third of 24 has ranks 6, 7 and 8."""
    latency = two_levels(Link(0.0, 1e30), Link(1.0, 1e30)).shared_by(Mesh(ring=world))
    rate = two_levels(Link(0.0, 1e30), Link(0.0, 1e9)).shared_by(Mesh(ring=world))
    shapes = [(n, m) for n in range(2, world + 1) for m in range(1, world // n + 1) if world % (n * m) == 0]
    for ranks, stride in shapes:
        in_nodes = [Counter(rank // 8 for rank in group) for group in groups_of(world, ranks, stride)]
        nodes, fewest = max(map(len, in_nodes)), min(min(one.values()) for one in in_nodes)
        assert latency.level(ranks, stride).name == ("node" if nodes == 1 else "between"), (ranks, stride)
        assert latency.all_reduce_seconds(1e6, ranks, stride) == pytest.approx(2 * (nodes - 1)), (ranks, stride)
        if nodes > 1 and world % 8 == 0:
            seconds = 2 * (ranks - 1) / ranks * 1e6 / (1e9 * (fewest if stride == 1 else 1))
            assert rate.all_reduce_seconds(1e6, ranks, stride) == pytest.approx(seconds), (ranks, stride)


def test_a_ring_of_3_on_24_gpus_crosses_nodes():
    """On 6 GPUs, all ranks are in one node."""
    machine = two_levels(Link(1e-5, 1e11), Link(1e-3, 1e8))
    slow, fast = (step_cost(SHAPE, Mesh(ring=3, dp=dp), machine, StepWork(96, dp), "pass_kv", NUMBERS) for dp in (8, 2))
    assert slow.parts["ring"] > 10 * fast.parts["ring"]


def test_links_between_hosts_are_slower_and_never_faster():
    slow = MACHINE.with_links(1e-3, 1e7).levels[0]
    assert slow.hop == slow.exchange == slow.gather_link == Link(1.1e-3, 1e7)
    assert MACHINE.with_links(0.0, 1e12).levels[0].hop == LINK


def test_rounded_messages_are_shorter():
    """Two steps, each of 2 messages of a third of the bytes: 300 values in 5 groups of 64, with a scale of 2 bytes.

    The embedding's all-reduce is never rounded.
    """
    parts = {
        name: prefill_cost(SHAPE, Mesh(tp=3), MACHINE, [96], [0], "pass_kv", replace(NUMBERS, reduce=name)).parts
        for name in ("float32", "int8")
    }
    exact = 4 * (1e-4 + 96 * 300 * 4 / 3 / 1e8)
    assert parts["int8"]["tp"] == pytest.approx(5 * 2 * 2 * (1e-4 + 2 * 96 * 5 * 66 / 3 / 1e8) + exact)
    assert parts["float32"]["tp"] == pytest.approx((5 * 2 + 1) * exact)


def test_a_measured_backward_and_all_reduce_replace_the_arithmetic():
    slow = replace(MACHINE, block_s=0.0, backward=5.0)
    times = [step_cost(SHAPE, Mesh(), one, StepWork(96, 1), "pass_kv", NUMBERS) for one in (MACHINE, slow)]
    usual = replace(MACHINE, block_s=0.0)
    forward = step_cost(SHAPE, Mesh(), usual, StepWork(96, 1), "pass_kv", NUMBERS).parts["attention"] / 3.5
    assert times[1].parts["attention"] == pytest.approx(6 * forward)
    level = replace(MACHINE.levels[0], reduce=Link(2e-3, 1e6))
    assert replace(MACHINE, levels=[level]).all_reduce_seconds(3e6, 3) == pytest.approx(4 * (2e-3 + 1.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("backward", 0), ("causal", -1), ("peak_flops", 0), ("ranks_at_once", 0), ("block_s", -1e-6), ("turn_s", -1),
     ("gemm_flops", math.nan), ("layer_s", math.inf), ("partial_element_bytes", 0)],
)  # fmt: skip
def test_impossible_constants_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        replace(MACHINE, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("gemm_flops", 0), ("weight_bytes_per_s", 0), ("layer_s", -1e-6)])
def test_impossible_rates_of_a_layer_are_refused(name, value):
    with pytest.raises(ValueError, match=f"layer {name}={value}"):
        replace(LayerRates(1e10, 1e9, 0.0, LINK), **{name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus_per_node": 7.9}, "7.9 is not a whole number"),
        ({"gpus_per_node": float("inf")}, "inf is not a whole number"),
        ({"gemm_flops": float("nan")}, "gemm_flops=nan"),
        ({"levels": "reversed"}, "give the smallest block of GPUs first"),
        ({"levels": "hop"}, "latency_s=nan"),
        ({"levels": "step"}, "within a node: step_s=-1.0: use a number from 0 on"),
    ],
)
def test_impossible_files_are_refused(change, words):
    values = yaml.safe_load((CONFIGS / "machine" / "h200.yaml").read_text())
    levels = {"reversed": values["levels"][::-1], "hop": [{**values["levels"][0], "hop": NAN}],
              "step": [{**values["levels"][0], "step_s": -1}]}  # fmt: skip
    change = {name: levels.get(value, value) if name == "levels" else value for name, value in change.items()}
    assert machine_of(values, "h200")
    with pytest.raises(ValueError, match=words):
        machine_of({**values, **change}, "h200")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"errors": {"prefill": {"share": math.nan, "axes": [], "ranks": 2}}},
            "share=nan is not a number of 0",
        ),
        ({"errors": {"prefill": {"share": 0.1, "axes": [], "ranks": 1.7}}}, "1.7 is not a whole number"),
        ({"ranks_at_once": 2.9}, "2.9 is not a whole number"),
        ({"causal": 0}, "causal=0"),
        ({"layer": {"training": TRAINING | {"backward": 0}}}, "training backward=0"),
        ({"layer": {"training": TRAINING | {"gradient_s": -1}}}, "training gradient_s=-1"),
        ({"layer": {"training": TRAINING | {"twice": 1}}}, "twice is not a field"),
        ({"layer": {"training": {"backward": 2, "gradient_s": 0, "loss_s": 0}}}, "no field 'update_s'"),
    ],
)
def test_constants_of_a_measured_machine_are_possible(change, words):
    link = {"latency_s": 1e-4, "bytes_per_s": 1e9}
    layer = {"gemm_flops": 3e9, "weight_bytes_per_s": 1e9, "layer_s": 0, "gather": link}
    rates = {"flops": 1e9, "kv_bytes_per_s": 1e9, "block_s": 0, "overlap": 1}
    values = {**rates, "hop": link, "exchange": link, "layer": layer}
    assert machine_of(values, "mine").training is None
    change = {"layer": layer | change["layer"]} if "layer" in change else change
    with pytest.raises(ValueError, match=words):
        machine_of({**values, **change}, "mine")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ring=2), Mesh(tp=2)], ids=str)
def test_measured_rates_of_training_replace_flops_and_bytes(mesh):
    """Rates equal to those by FLOPs and bytes change nothing; others change products and optimizer only."""
    read_s = NUMBERS.element / MACHINE.memory_bytes_per_s
    by_flops = TrainRates(2.0, 3 * read_s, 28 / MACHINE.memory_bytes_per_s, 0.0)
    for work in (StepWork(96, 1), StepWork(96, 1, recompute="full"), StepWork(96, 1, zero1=True)):
        plain, same, slower = (
            step_cost(SHAPE, mesh, replace(MACHINE, training=rates), work, "pass_kv", NUMBERS).parts
            for rates in (None, by_flops, replace(by_flops, backward=3.5, update_s=2 * by_flops.update_s, loss_s=1e-6))
        )
        of_head = 3 * read_s * SHAPE.hidden * SHAPE.vocab_size / mesh.tp  # part of the measured loss
        assert same == pytest.approx({**plain, "products": plain["products"] - of_head})
        assert slower["optimizer"] == pytest.approx(2 * plain["optimizer"])
        others = {"products", "optimizer"}
        assert {name: x for name, x in slower.items() if name not in others} == pytest.approx(
            {name: x for name, x in plain.items() if name not in others}
        )
        weights, head = SHAPE.layers * sum(layer_weights(SHAPE)), SHAPE.hidden * SHAPE.vocab_size
        rows = 96 / (mesh.ring * mesh.tp)
        more = 1.5 * 2 * weights / MACHINE.gemm_flops * rows + head * (
            1e-6 / SHAPE.hidden * rows - 3 * read_s / mesh.tp
        )
        assert slower["products"] - plain["products"] == pytest.approx(more)


def causal_pairs(ring, new, cached, window):
    """Return the share of all visible pairs that is in causal tiles: in the cost model, and by the tiles."""
    turn = zigzag(new, ring).after(zigzag(cached, ring)) if cached else zigzag(new, ring)
    keys = [(*before, *own) for before, own in zip(zigzag(cached, ring).ranks, turn.ranks, strict=True)]
    mask = Mask(window) if window else CAUSAL
    tiles = [tile for q in turn.ranks for k in (keys if cached else turn.ranks) for tile in visible_tiles(q, k, mask)]
    work = Work([new], [cached], ring, 4, 2, 8, 4, window)
    true = sum(tile.pairs for tile in tiles if tile.causal) / sum(tile.pairs for tile in tiles)
    return work.causal_flops / work.flops, true


@pytest.mark.parametrize(
    ("ring", "new", "cached", "window"),
    [(1, 1200, 0, None), (2, 1200, 0, None), (3, 1200, 0, None), (4, 1200, 0, None), (3, 1200, 3000, None),
     (1, 512, 2000, 512), (1, 256, 2000, 512), (2, 4096, 0, 512), (4, 4096, 0, 512)],
)  # fmt: skip
def test_pairs_in_causal_tiles_are_those_of_the_tiles(ring, new, cached, window):
    predicted, true = causal_pairs(ring, new, cached, window)
    assert predicted == pytest.approx(true, rel=0.03)


def test_slow_causal_tiles_count_by_their_pairs():
    work = Work([600], [0], 2, 4, 2, 8, 4)
    seconds = [2 * block_seconds(work, replace(KERNEL, causal=causal)) for causal in (1.0, 1.5)]
    assert seconds[1] - seconds[0] == pytest.approx(0.5 * work.causal_flops / KERNEL.flops / 2)


NAN = {"latency_s": float("nan"), "bytes_per_s": 1e9}


def test_recomputation_exchanges_heads_and_sums_again():
    """Measured: a rank sends half as much again over Ulysses, and one all-reduce more a layer with tp."""
    work = {kind: StepWork(96, 1, recompute=kind) for kind in ("none", "selective", "full")}
    cost_of = partial(step_cost, SHAPE, machine=MACHINE, strategy="pass_kv", numbers=NUMBERS)
    ulysses = [cost_of(mesh=Mesh(ulysses=2), work=one).bytes["ulysses"] for one in work.values()]
    assert ulysses == [ulysses[0], 1.5 * ulysses[0], 1.5 * ulysses[0]]
    tp = [cost_of(mesh=Mesh(tp=2), work=one).bytes["tp"] for one in work.values()]
    assert tp == pytest.approx([tp[0], 6 / 5 * tp[0], 7 / 5 * tp[0]])


def test_tiles_of_an_mlp_are_computed_again_with_messages_for_each():
    """Counted in a run with tp=2: 7 gathers and scatters of a layer are by tile, 9 with recomputation."""
    cost_of = partial(step_cost, SHAPE, strategy="pass_kv", numbers=NUMBERS)
    plain = cost_of(Mesh(tp=2), MACHINE, StepWork(96, 1))
    for recompute, sums, in_tiles in (("none", 6, 3.5), ("selective", 7, 4.5), ("full", 8, 4.5)):
        tiled = cost_of(Mesh(tp=2), MACHINE, StepWork(96, 1, recompute=recompute, mlp_rows=10))
        assert tiled.bytes["tp"] == pytest.approx(sums / 5 * plain.bytes["tp"])
        # 48 rows of a rank are 5 tiles, so 4 more messages, of two steps, for each of a layer's reductions in tiles.
        latency = 5 * in_tiles * 4 * 2 * 1e-4
        assert tiled.parts["tp"] == pytest.approx(sums / 5 * plain.parts["tp"] + latency)
    none, rows = (cost_of(Mesh(), MACHINE, StepWork(96, 1, mlp_rows=n)).parts["products"] for n in (None, 96))
    ffn = 5 * 3 * 300 * 720  # weights, read and multiplied once more
    assert rows - none == pytest.approx(2 * ffn * 96 / 1e10 + ffn * 4 / 1e9)


def test_dropped_reductions_are_not_recomputed():
    """Counted in a run: a block that drops one gathers and scatters once in each direction, and not for its MLP."""
    drops = Numbers(4, 4, spd_share=1)
    work = {kind: StepWork(96, 1, recompute=kind) for kind in ("none", "selective", "full")}
    cost_of = partial(step_cost, SHAPE, Mesh(tp=2), MACHINE, strategy="pass_kv")
    none = cost_of(work["none"], numbers=NUMBERS).bytes["tp"]
    sent = [cost_of(one, numbers=drops).bytes["tp"] for one in work.values()]
    assert sent == pytest.approx([2 / 5 * none, 2 / 5 * none, 3 / 5 * none])


@pytest.mark.parametrize("norms", ["post", "sandwich"])
def test_dropped_reductions_of_normalised_outputs_save_messages_and_no_bytes(norms):
    shape, drops, mesh = replace(SHAPE, norms=norms), Numbers(4, 4, spd_share=1), Mesh(tp=2)
    for cost_of in (
        lambda numbers: prefill_cost(shape, mesh, MACHINE, [96], [48], "pass_kv", numbers),
        lambda numbers: decode_cost(shape, mesh, MACHINE, [96], "gather_merge", numbers),
        lambda numbers: decode_cost(shape, Mesh(ring=2), MACHINE, [96], "sharded", numbers),
    ):
        plain, dropped = cost_of(NUMBERS), cost_of(drops)
        assert dropped.bytes == plain.bytes and dropped.seconds < plain.seconds
    step = [
        step_cost(shape, mesh, MACHINE, StepWork(96, 1), "pass_kv", numbers).bytes["tp"] for numbers in (NUMBERS, drops)
    ]
    assert step[1] == pytest.approx(3 / 5 * step[0]), "counted in a run of OLMo 2"


def test_norm_over_all_heads_sums_a_number_for_each_row_of_queries_and_of_keys():
    wide, mesh = replace(SHAPE, qk_norm="width"), Mesh(tp=2)
    more = [prefill_cost(shape, mesh, MACHINE, [96], [0], "pass_kv", NUMBERS).bytes["tp"] for shape in (SHAPE, wide)]
    assert more[1] - more[0] == SHAPE.layers * 2 * 96 * 4
    costs = [decode_cost(shape, mesh, MACHINE, [96], "gather_merge", NUMBERS).parts["tp"] for shape in (SHAPE, wide)]
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.1), "messages of few bytes"


def test_stages_of_a_pipeline_send_the_rows_of_one_tensor_parallel_rank():
    sent = [
        step_cost(SHAPE, Mesh(tp=tp, pp=2), MACHINE, StepWork(96, 4), "pass_kv", NUMBERS).bytes["pp"] for tp in (1, 2)
    ]
    assert sent == [2 * 4 * 96 * SHAPE.hidden * 4, 4 * 96 * SHAPE.hidden * 4]


def test_context_ranks_send_nothing_for_a_norm_over_all_heads():
    wide = replace(SHAPE, qk_norm="width")
    cost = [decode_cost(shape, Mesh(ring=2), MACHINE, [96], "sharded", NUMBERS) for shape in (SHAPE, wide)]
    assert cost[0].bytes == cost[1].bytes and cost[0].seconds == cost[1].seconds
