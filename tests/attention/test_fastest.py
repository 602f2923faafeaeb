"""``context.kernel=auto`` on a GPU: the fastest kernel that is exact on every rank; checks and timings are injected."""

import math
from dataclasses import replace

import pytest
import torch

from longctx.attention import backends
from longctx.attention.backends import KERNELS, candidates, checked_kernel, kernel_for
from longctx.attention.fastest import fastest_exact, tile_seconds
from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import reference

SECONDS = {"flash_cuda": 3.0, "cudnn": 2.0, "flash_attn": 1.0}
GPU = [KERNELS[name] for name in SECONDS]


def choose(inexact=(), elsewhere=None):
    """Return the name of the chosen kernel.

    ``inexact`` maps kernels to the errors that their check raises.  ``elsewhere`` has the kernels' seconds on a second
    rank (None: the same as here).
    """

    def check(kernel):
        if kernel.name in inexact:
            raise inexact[kernel.name]

    def slowest(measured):
        return [max(pair) for pair in zip(measured, elsewhere or measured, strict=True)]

    return fastest_exact(GPU, check, lambda kernel: SECONDS[kernel.name], slowest).name


class CannotCompile(Exception):
    """As Triton's errors, of no other class."""


def test_fastest_is_chosen():
    assert choose() == "flash_attn"


def test_fastest_exact_kernel_is_chosen_if_a_faster_one_is_inexact_or_fails():
    assert choose({"flash_attn": ValueError("off by 0.1")}) == "cudnn"
    failures = {"flash_attn": RuntimeError("no kernel image"), "cudnn": ImportError("libcudnn")}
    assert choose(failures) == "flash_cuda"
    assert choose({"flash_attn": CannotCompile("ptxas")}) == "cudnn", "errors of Triton are of no common class"


def test_the_slowest_rank_decides_and_a_kernel_that_fails_on_one_rank_is_not_chosen():
    assert choose(elsewhere=[1.0, 1.0, 9.0]) == "cudnn"
    assert choose(elsewhere=[1.0, 1.0, math.inf]) == "cudnn"


def test_no_exact_kernel_is_refused_with_every_reason():
    failures = {name: ValueError(f"{name} is off\nby much") for name in SECONDS}
    with pytest.raises(ValueError, match=r"cudnn: cudnn is off; flash_attn: .* use context\.kernel=reference"):
        choose(failures)
    with pytest.raises(ValueError, match="failed on another rank"):
        choose(elsewhere=[math.inf] * 3)


def test_candidates_are_the_installed_kernels_of_the_device(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda name: name != "flash_attn")
    assert [kernel.name for kernel in candidates("cuda", "bfloat16")] == ["flash_cuda", "cudnn", "triton"]
    assert kernel_for("auto", "cuda", "bfloat16").name == "flash_cuda"
    with pytest.raises(ValueError, match=r"auto does not take float32 on cuda; use .* model\.dtype=bfloat16"):
        candidates("cuda", "float32")


def test_auto_checks_and_times_each_candidate_on_the_device(monkeypatch):
    """On the meta device, with CPU kernels in place of a GPU's: a wrong one, and two whose times are given."""
    wrong = replace(flash_cpu, name="wrong")
    checked = []

    def refuse(kernel, device, dtype, head_dim):
        checked.append((kernel.name, device.type, dtype, head_dim))
        if kernel is wrong:
            raise ValueError("off by 1")

    seconds = {"wrong": 0.0, "reference": 2.0, "flash_cpu": 1.0}
    monkeypatch.setattr(backends, "candidates", lambda *_: [wrong, reference, flash_cpu])
    monkeypatch.setattr(backends, "refuse_inexact", refuse)
    monkeypatch.setattr(backends, "tile_seconds", lambda kernel, *_: seconds[kernel.name])
    assert checked_kernel("auto", torch.device("meta"), "bfloat16", 80) is flash_cpu
    assert checked == [(name, "meta", torch.bfloat16, 80) for name in seconds]


def test_a_tile_is_timed_forward_and_backward():
    calls = []
    counted = replace(
        flash_cpu,
        forward=lambda *x: calls.append("forward") or flash_cpu.forward(*x),
        backward=lambda *x: calls.append("backward") or flash_cpu.backward(*x),
    )
    assert 0 < tile_seconds(counted, torch.device("cpu"), torch.float32, 16, rows=19) < 10
    assert calls == ["forward", "backward"] * 4
