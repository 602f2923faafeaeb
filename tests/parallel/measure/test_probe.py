"""The probe gives every rank the same plausible numbers."""

from dataclasses import astuple
from math import isinf

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
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
