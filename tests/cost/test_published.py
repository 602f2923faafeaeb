"""The cost model against the published tables in tests/cost/published (longctx/cost/README.md has every row)."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from longctx.config import Mesh
from longctx.cost.forward import Numbers, decode_cost, forward_flops, prefill_cost
from longctx.cost.machine_file import machine_of
from longctx.cost.memory import inference_bytes, step_bytes
from longctx.cost.step import StepWork
from tests.cost.page import PAGE, rows_table
from tests.cost.predict import (
    ROOT,
    count_winners,
    errors_of,
    machine,
    mean_error,
    predict,
    rows_of,
    shape_named,
    tables,
)

GTT = "h100_gtt"
TIMES = [name for name in tables() if name != "spd_text"]


@pytest.mark.parametrize("table", TIMES)
def test_mean_error_of_each_table_of_times(table):
    rows = rows_of(table)
    assert mean_error(rows, machine(rows[0].hardware)) <= 0.06


@pytest.mark.parametrize("paper", ["cp_", "usp_"])
def test_mean_error_over_all_times_of_a_paper(paper):
    names = [name for name in TIMES if name.startswith(paper)]
    errors = [error for name in names for error in errors_of(rows_of(name), machine(rows_of(name)[0].hardware))]
    assert np.mean(np.abs(errors)) <= 0.05


def test_faster_strategy_of_table_4_and_its_crossover():
    """The tie at T = 6,400 (0.3 %) is the row that is missed (V7); the crossover is at a miss rate of 5 % to 10 %."""
    assert count_winners(machine(GTT)) == 13
    rows = {(row.new, row.strategy): predict(row, machine(GTT)) for row in rows_of("cp_table4")}
    faster_q = [new for new, strategy in rows if strategy == "pass_q" and rows[new, "pass_q"] < rows[new, "pass_kv"]]
    assert max(faster_q) in (4160, 6400)
    # V8: at 10 % pass-Q is 124.6 ms slower.
    assert rows[12800, "pass_q"] - rows[12800, "pass_kv"] == pytest.approx(0.1246, rel=0.12)


def test_flops_and_rate_of_a_million_tokens():
    """V1: 4.94e18 FLOPs in 77 s on 128 GPUs are 501 TFLOP/s, 63 % of 800."""
    shape = shape_named("llama3_405b")
    flops = forward_flops(shape, [10**6], [0])
    assert flops == pytest.approx(4.94e18, rel=0.01)
    assert flops / 77 / 128 / 800e12 == pytest.approx(0.63, abs=0.005)


def test_dropped_reductions_save_the_published_share():
    """V12: dropping in 70 % of blocks saves 19.7 %.  In all blocks, half of the transfers go (V13: over 46 %).

    The embedding's all-reduce stays, beside two in each of 80 layers.  In Figure 2, 160 all-reduces take up to 14 ms
    (300 GB/s) and 300 ms (10 GB/s); the faster links gain less.
    """
    (row,) = rows_of("spd_text")
    assert predict(row, machine("a100_lbw")) == pytest.approx(0.197, abs=0.005)
    shape, mesh = shape_named("llama2_70b"), Mesh(tp=8)
    parts = [prefill_cost(shape, mesh, machine("a100_lbw"), [128], [0], "pass_kv", Numbers(2, 2, p)) for p in (0, 1)]
    assert parts[1].parts["tp"] == pytest.approx(parts[0].parts["tp"] * 81 / 161)
    assert predict(row, machine("a100_hbw")) < predict(row, machine("a100_lbw")) / 2
    for hardware, limit in (("a100_hbw", 14e-3), ("a100_lbw", 0.3)):
        assert 160 * machine(hardware).all_reduce_seconds(128 * 8192 * 2, 8) < limit


def test_sequence_parallelism_is_slower_than_data_parallelism():
    """V20: sequence parallelism has 0.89 to 0.96 of the rate of data parallelism."""
    pairs = zip(rows_of("usp_figure5")[::2], rows_of("usp_figure5")[1::2], strict=True)
    for dp, sp in pairs:
        assert 0.85 < predict(dp, machine("a800")) / predict(sp, machine("a800")) < 1


def test_best_degrees_on_l20_are_ulysses_2_by_ring_4():
    rows = [row for row in rows_of("usp_l20") if row.new == 131072]
    best = min(rows, key=lambda row: predict(row, machine("l20_pcie")))
    assert (best.mesh.ulysses, best.mesh.ring) == (2, 4)


def test_page_shows_these_predictions():
    page = PAGE.read_text()
    for name in tables():
        for line in rows_table(rows_of(name)):
            assert line in page, "run make published"


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "machine").glob("*.yaml")), ids=lambda file: file.stem)
def test_hardware_files_are_machines(file):
    values = yaml.safe_load(file.read_text())
    one = machine_of(values, file.stem)
    assert one.memory_bytes and one.peak_flops and one.gpus_per_node == 8
    wrong = ({"gemm_flops": 0}, {"levels": [{}]}, {"overlap": 2}, {"levels": 3}, {"layer_seconds": 1e-5})
    level = values["levels"][0]
    links = [{**level, "steps": 1}, {**level, "hop": {**level["hop"], "bluk": level["hop"]}}]
    for broken in [*({**values, **one} for one in wrong), *({**values, "levels": [one]} for one in links)]:
        with pytest.raises(ValueError, match="copy a file of configs/machine"):
            machine_of(broken, file.stem)
    with pytest.raises(ValueError, match="layer_s"):
        machine_of({name: value for name, value in values.items() if name != "layer_s"}, file.stem)


def total_bytes(model, mesh, length, batch=1, sequences=1):
    work = StepWork(length * 1024, batch, sequences, zero1=True)
    return sum(step_bytes(shape_named(model), mesh, work, "pass_kv", Numbers()).values())


@pytest.mark.parametrize(
    ("model", "mesh", "length", "sequences", "fits"),
    [
        ("llama3_8b_32k", Mesh(ulysses=8, ring=2), 80, 1, True),
        ("llama3_8b_32k", Mesh(ulysses=8, ring=2), 120, 1, False),
        ("llama3_8b_32k", Mesh(ring=16), 80, 1, True),
        ("llama3_8b_32k", Mesh(ring=16), 120, 1, False),
        ("llama3_8b_32k", Mesh(ulysses=8, ring=2), 64, 2, False),
        ("llama3_8b_32k", Mesh(tp=2, ulysses=4, ring=2), 120, 1, True),
        ("llama3_8b_32k", Mesh(tp=4, ulysses=2, ring=2), 160, 1, True),
        ("llama3_8b_32k", Mesh(tp=4, ring=4), 190, 1, True),
        ("llama3_8b_32k", Mesh(tp=8, ring=2), 208, 1, True),
        ("llama2_7b", Mesh(ulysses=8), 64, 1, False),
    ],
)
def test_runs_of_the_hybrid_paper_fit_or_do_not(model, mesh, length, sequences, fits):
    """arXiv 2405.07719: context parallelism alone runs out of 80 GB at 120K tokens, and with two sequences at 64K."""
    assert (total_bytes(model, mesh, length, sequences, sequences) <= 80e9) == fits


def test_405b_fits_8_gpus_only_with_8_bit_feed_forward_weights():
    """arXiv 2411.01783: 1M tokens on 16 nodes of tp=8; 516,096 bytes of keys and values a token."""
    shape, mesh = shape_named("llama3_405b"), Mesh(tp=8, ring=16)
    half, eight = (inference_bytes(shape, mesh, [10**6], [0], "pass_kv", Numbers(2, ffn)) for ffn in (2, 1))
    assert sum(half.values()) > 96e9 > sum(eight.values())
    assert eight["kv_cache"] * mesh.ranks / 10**6 == 516_096


def test_optimizer_state_is_sharded_by_zero1_only():
    shape, mesh = shape_named("llama3_8b"), Mesh(tp=2, ring=3, dp=5)
    work = StepWork(4096, 5)
    plain, sharded = (step_bytes(shape, mesh, one, "pass_kv", Numbers()) for one in (work, replace(work, zero1=True)))
    assert plain["optimizer"] == pytest.approx(15 * sharded["optimizer"])
    assert {**plain, "optimizer": 0} == {**sharded, "optimizer": 0}


def test_decoding_by_one_exchange_beats_pass_q_on_several_nodes():
    shape, mesh = shape_named("llama3_405b"), Mesh(tp=8, ring=4)
    gather, pass_q = (
        decode_cost(shape, mesh, machine(GTT), [128000], strategy, Numbers(2, 1)).seconds
        for strategy in ("gather_merge", "pass_q")
    )
    assert gather < pass_q
