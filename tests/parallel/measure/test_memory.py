"""Bytes by part against sizes known beforehand, and their peak against the allocator's own events."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from longctx.parallel.measure.memory import MemoryMeter


def make_logits(rows: int) -> torch.Tensor:
    return copy_of(torch.ones(rows, 7, dtype=torch.float64))


def copy_of(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_a_tensor_belongs_to_the_innermost_function_that_is_named():
    meter = MemoryMeter({"logits": [make_logits], "copies": [copy_of]})
    with meter:
        outside = torch.ones(11)
        logits = make_logits(5)
        assert meter.live == {"activations": 44, "copies": 280}  # the original of the copy is freed
        logits[2:].mul_(2)  # views and writes in place allocate nothing
        row = logits[0]
        del logits
        assert meter.live == {"activations": 44, "copies": 280}  # a row keeps the whole storage
        del row, outside
    assert meter.live == {}
    assert meter.peak == {"activations": 44, "logits": 280, "copies": 280}


def test_held_tensors_count_once_and_are_in_the_peak():
    weight = torch.ones(13, 3)
    meter = MemoryMeter({})
    meter.hold("weights", [weight, weight.T, weight[:2]])
    with meter:
        weight.mul_(2)
        assert weight.sum() == 78  # the sum and the comparison are 4 bytes and 1 byte, for a moment
    assert meter.peak == {"weights": 156, "activations": 5}
    assert meter.live == {"weights": 156}


def allocator_peak(step) -> int:
    """Return the largest sum of torch's allocations minus frees during ``step``, from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    total = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_peak_of_a_backward_is_that_of_the_allocator():
    net = nn.Sequential(nn.Linear(53, 101), nn.GELU(), nn.LayerNorm(101), nn.Linear(101, 31))
    x = torch.randn(211, 53)

    def step() -> None:
        net.zero_grad()
        net(x).square().sum().backward()

    step()
    net.zero_grad()
    meter = MemoryMeter({})
    meter.hold("weights", net.parameters())
    weights = sum(meter.live.values())
    with meter:
        step()
    assert sum(meter.peak.values()) - weights == allocator_peak(step)
