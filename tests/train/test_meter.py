"""A step's figures compared with explicit sums and with values measured by other means."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.attention.kernel import reference
from longctx.attention.layout import zigzag
from longctx.cost.hardware import Hardware, Link, hardware_of
from longctx.cost.training import train_flops
from longctx.model_shape import ModelShape
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.measure import probe
from longctx.parallel.measure.comm_timer import ExposedCommTimer, TimedComm
from longctx.parallel.measure.probe import gemm_flops
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import run_threads
from longctx.train.meter import Meter, StepCost, peak_bytes
from tests.parallel.problem import problem, solve

CPU = torch.device("cpu")
SHAPE = ModelShape(3, 15, 5, 1, 3, 41, 97, 64, 1e-5, True, False, (), windows=(None, 7, None))
COST = StepCost(
    seconds=4.0,
    tokens=22,
    ranks=2,
    flops=240.0,
    flops_causal=160.0,
    peak_flops=50.0,
    peak_bytes=1009,
    exposed_s={"shift": 0.5, "all_to_all": 0.1},
)


def test_figures_of_a_step():
    assert COST.figures() == pytest.approx(
        {
            "step_s": 4.0,
            "tokens_per_s": 5.5,
            "mfu": 0.6,
            "mfu_causal": 0.4,
            "mem/peak_bytes": 1009,
            "comm/exposed_s": 0.6,
            "comm/exposed_share": 0.15,
            "comm/shift_s": 0.5,
            "comm/all_to_all_s": 0.1,
        }
    )


def test_mfu_is_none_without_a_peak_rate():
    figures = replace(COST, peak_flops=None).figures()
    assert figures["mfu"] is None and figures["mfu_causal"] is None
    assert figures["tokens_per_s"] == 5.5


def test_step_is_measured_from_begin_to_end():
    meter = Meter(SHAPE, 2, CPU, comm_timer := ExposedCommTimer(), peak_flops=1e9)
    with comm_timer.during("shift", CPU):
        time.sleep(1.1)  # before the step, as an evaluation or a checkpoint
    meter.begin()
    with comm_timer.during("all_gather", CPU):
        time.sleep(0.2)
    time.sleep(0.1)
    cost = meter.end([17, 5])
    assert cost.exposed_s.keys() == {"all_gather"} and 0.2 <= cost.exposed_s["all_gather"] < cost.seconds
    assert 0.3 <= cost.seconds < 1.1
    assert (cost.tokens, cost.ranks, cost.peak_flops) == (22, 2, 1e9)
    assert (cost.flops, cost.flops_causal) == tuple(train_flops(SHAPE, [17, 5], causal) for causal in (False, True))
    with pytest.raises(AssertionError, match=r"begin\(\) comes before end\(\)"):
        meter.end([17, 5])


def test_exposed_communication_of_a_real_step():
    """Attention forward and backward on three threads, one of which starts a second late."""
    task = problem(zigzag(37, 3))

    def main(world, rank):
        comm = TimedComm(world.group(rank), comm_timer := ExposedCommTimer())
        meter = Meter(SHAPE, 3, CPU, comm_timer)
        comm.all_gather(torch.zeros(1), [(1,)] * 3)
        meter.begin()
        if rank == 1:
            time.sleep(1)
        ring = Ring(comm, task.queries, task.keys)
        answer, _ = solve(ring_attention(ring, reference, STRATEGIES["pass_kv"]), task, rank, lambda: comm.traffic)
        return answer, meter.end([37])

    answers, costs = zip(*run_threads(3, main), strict=True)
    task.assert_solved(answers, 1e-10)
    exposed = [cost.figures()["comm/exposed_s"] for cost in costs]
    assert exposed[2] > 0.4  # waits for its neighbor
    assert exposed[1] < exposed[2] - 0.2
    assert all(0 < cost.figures()["comm/exposed_share"] < 1 for cost in costs)


def test_peak_memory_on_cpu_is_that_of_the_process():
    before = peak_bytes(CPU)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    more = torch.ones(before - resident + 97 * 2**20, dtype=torch.uint8)
    assert before + 90 * 2**20 < peak_bytes(CPU) < before + 120 * 2**20
    del more
    assert peak_bytes(CPU) > before + 90 * 2**20


def test_measured_peak_is_the_flops_of_the_timed_product(monkeypatch):
    ranks = run_threads(2, lambda world, rank: gemm_flops(world.group(rank), torch.float32, CPU))
    assert ranks[0] == ranks[1] > 0
    counted = []

    def slowest(world, work, device):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return 0.5

    monkeypatch.setattr(probe, "_slowest", slowest)
    assert gemm_flops(SingleRankComm(), torch.float32, CPU) == counted[0] / 0.5


def test_hardware_file_may_set_the_peak():
    link = {"latency_s": 1e-6, "bytes_per_s": 1e9}
    values = {"flops": 1e9, "kv_bytes_per_s": 1e9, "block_s": 0, "overlap": 1, "hop": link, "exchange": link}
    assert hardware_of(values, "hardware=x").peak_flops is None
    assert hardware_of({**values, "peak_flops": "312e12"}, "hardware=x").peak_flops == 312e12
    with pytest.raises(ValueError, match=r"peak_flop is not a field of a hardware file: .*measured, errors, flops, "):
        hardware_of({**values, "peak_flop": 1e12}, "hardware=x")
    with pytest.raises(ValueError, match=r"peak_flops=-1\.0: use a number above 0"):
        hardware_of({**values, "peak_flops": -1}, "hardware=x")
    assert Hardware(1.0, 1.0, 0.0, Link(0, 1), Link(0, 1), 1.0).peak_flops is None
