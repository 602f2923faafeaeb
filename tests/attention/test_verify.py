"""Verification refuses kernels with the errors that attention libraries are known to make."""

from dataclasses import replace

import pytest
import torch

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.kernel import Kernel, reference
from longctx.attention.partial import Partial
from longctx.attention.verify import refuse_inexact

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", [reference, flash_cpu], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_kernel_passes(kernel, dtype):
    refuse_inexact(kernel, CPU, dtype)


def wrong_kernel(**changes) -> Kernel:
    return replace(flash_cpu, name="wrong", **changes)


def round_lse_to_bfloat16(q, k, v, causal):
    """Return float32 values that were rounded to bfloat16: the error grows with every merge."""
    part = flash_cpu.forward(q, k, v, causal)
    return Partial(part.out, part.lse.bfloat16().float())


def test_half_precision_lse_is_refused():
    with pytest.raises(ValueError, match="in its log-sum-exp"):
        refuse_inexact(wrong_kernel(forward=round_lse_to_bfloat16), CPU, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_verifies_at_the_model_head_dim(head_dim):
    refuse_inexact(flash_cpu, CPU, torch.bfloat16, head_dim)


def lse_in_base_two(q, k, v, causal):
    part = flash_cpu.forward(q, k, v, causal)
    return Partial(part.out, part.lse / torch.log(torch.tensor(2.0)))


def ignore_mask(q, k, v, causal):
    return flash_cpu.forward(q, k, v, False)


def swap_kv_heads(q, k, v, causal):
    return flash_cpu.forward(q, k.flip(2), v.flip(2), causal)


def double_dk(*inputs):
    dq, dk, dv = flash_cpu.backward(*inputs)
    return dq, 2 * dk, dv


def return_nan(*inputs):
    return tuple(x * torch.nan for x in flash_cpu.backward(*inputs))


@pytest.mark.parametrize("forward", [lse_in_base_two, ignore_mask, swap_kv_heads])
def test_wrong_forward_is_refused(forward):
    with pytest.raises(
        ValueError, match=r"wrong is off by .* on cpu in torch\.float32 .*use context\.kernel=reference"
    ):
        refuse_inexact(wrong_kernel(forward=forward), CPU, torch.float32)


@pytest.mark.parametrize("backward", [double_dk, return_nan])
def test_wrong_backward_is_refused(backward):
    with pytest.raises(ValueError, match="kernel wrong is off by"):
        refuse_inexact(wrong_kernel(backward=backward), CPU, torch.bfloat16)
