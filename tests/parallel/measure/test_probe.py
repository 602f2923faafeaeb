"""A probe ends, and every rank holds the same sensible numbers."""

from dataclasses import astuple
from math import isinf

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.parallel.measure import probe as probing
from longctx.parallel.threads import run_threads


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_hold_the_same_numbers(size, monkeypatch):
    for name, small in {"_ROUNDS": 3, "_WIDE": 64, "_LONG": 512, "_LARGE": 2**16}.items():
        monkeypatch.setattr(probing, name, small)
    found = run_threads(
        size,
        lambda world, rank: probing.probe(world.group(rank), flash_cpu, (3, 1), 8, torch.float32, torch.device("cpu")),
    )
    assert all(one == found[0] for one in found)
    assert 0 <= found[0].overlap <= 1
    assert found[0].flops > 0 and found[0].block_s > 0
    for link in (found[0].hop, found[0].exchange):
        assert astuple(link) >= (0.0, 0.0) and isinf(link.bytes_per_s) == (size == 1)


def test_a_link_too_fast_to_measure_asks_for_no_more_memory_than_there_is(monkeypatch):
    """A large message that took no longer than a small one."""
    sizes = []
    monkeypatch.setattr(probing, "_slowest", lambda *_: 1e-3)
    hop = probing._hop
    monkeypatch.setattr(probing, "_hop", lambda ring, size, *a, **kw: sizes.append(size) or hop(ring, 1, *a, **kw))
    run_threads(2, lambda w, r: probing.probe(w.group(r), flash_cpu, (3, 1), 8, torch.float32, torch.device("cpu")))
    assert max(sizes) <= 8 * probing._LARGE
