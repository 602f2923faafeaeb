"""The probe gives every rank the same plausible numbers, and derives them from seconds as documented."""

from dataclasses import astuple
from math import isinf

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.cost.hardware import LayerRates, Link
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.measure import probe as probe_module
from longctx.parallel.threads import run_threads


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_get_the_same_numbers(size, monkeypatch):
    for name, small in {"_ROUNDS": 3, "_WIDE": 64, "_LONG": 512, "_LARGE": 2**16}.items():
        monkeypatch.setattr(probe_module, name, small)
    results = run_threads(
        size,
        lambda world, rank: probe_module.probe(
            world.group(rank), flash_cpu, (3, 1), 8, torch.float32, torch.device("cpu")
        ),
    )
    assert all(one == results[0] for one in results)
    assert 0 <= results[0].overlap <= 1
    assert results[0].flops > 0 and results[0].block_s > 0
    for link in (results[0].hop, results[0].exchange):
        assert astuple(link) >= (0.0, 0.0) and isinf(link.bytes_per_s) == (size == 1)


def test_message_size_is_limited_on_links_too_fast_to_measure(monkeypatch):
    """A large message takes as long as a small one, so the fitted bandwidth is unbounded."""
    sizes = []
    monkeypatch.setattr(probe_module, "_slowest", lambda *_: 1e-3)
    hop = probe_module._hop
    monkeypatch.setattr(probe_module, "_hop", lambda ring, size, *a, **kw: sizes.append(size) or hop(ring, 1, *a, **kw))
    run_threads(
        2, lambda w, r: probe_module.probe(w.group(r), flash_cpu, (3, 1), 8, torch.float32, torch.device("cpu"))
    )
    assert max(sizes) <= 8 * probe_module._LARGE


CPU = torch.device("cpu")


def test_ratios_of_tiles_follow_from_their_seconds(monkeypatch):
    """A full tile has twice as many visible pairs as a causal one."""
    seconds = iter([0.004, 0.003, 0.010])  # full, causal, backward

    def timed(_ring, work, _device):
        work()
        return next(seconds)

    monkeypatch.setattr(probe_module, "_ROWS", 31)
    monkeypatch.setattr(probe_module, "_slowest", timed)
    ratios = probe_module.probe_tiles(SingleRankComm(), flash_cpu, (3, 1), 8, torch.float32, CPU)
    assert ratios == pytest.approx((2.5, 1.5))


def test_rates_of_training_follow_from_seconds(monkeypatch):
    """A loss of 100 logits takes 0.75 s, of which its GEMMs take 0.5 s."""

    def timed(_ring, work, _device):
        seconds = work()
        return 0.75 if isinstance(seconds, tuple) else seconds

    monkeypatch.setattr(probe_module, "_slowest", timed)
    weights, rates = 1000, LayerRates(2e6, 1e9, 0.0, Link(0.0, 1e9))  # the forward of a row takes 1 ms
    works = lambda rows: 0.7 + 4e-3 * rows, lambda: 0.03, lambda _: (100, 1e6)
    found = probe_module.probe_training(SingleRankComm(), *works, weights, rates, 0.2, CPU)
    assert astuple(found) == pytest.approx((3.0, 0.5 / weights, 0.03 / weights, 0.25 / 100))


@pytest.mark.parametrize(
    ("once", "both", "in_turn", "added"),
    [(0.001, 0.045, 20, 0.002), (0.01, 0.045, 5, 0.008), (9.0, 0.045, 1, 0.04), (0.01, 0.004, 5, 1e-7)],
)
def test_message_takes_what_it_adds_to_a_product(monkeypatch, once, both, in_turn, added):
    """A slow message is sent fewer times."""
    seconds, sent = iter([once, 0.005, both]), []

    def timed(_ring, work, _device):
        sent.clear()
        work()
        return next(seconds)

    monkeypatch.setattr(probe_module, "_slowest", timed)
    assert probe_module.added_seconds(SingleRankComm(), lambda: sent.append(1), CPU) == pytest.approx(added)
    assert len(sent) == in_turn
