"""A kernel that is off in any of the ways that libraries are off is refused on the device where it is."""

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
def test_an_exact_kernel_passes(kernel, dtype):
    refuse_inexact(kernel, CPU, dtype)


def off(**changed) -> Kernel:
    return replace(flash_cpu, name="off", **changed)


def rounded_between(q, k, v, causal):
    """What travels is float32, rounded to bfloat16: the error grows with every merge."""
    part = flash_cpu.forward(q, k, v, causal)
    return Partial(part.out, part.lse.bfloat16().float())


def test_a_log_sum_exp_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="in its log-sum-exp"):
        refuse_inexact(off(forward=rounded_between), CPU, torch.bfloat16)


@pytest.mark.parametrize("width", [8, 80, 128])
def test_it_is_checked_at_the_width_of_the_model(width):
    refuse_inexact(flash_cpu, CPU, torch.bfloat16, width)


def in_base_two(q, k, v, causal):
    part = flash_cpu.forward(q, k, v, causal)
    return Partial(part.out, part.lse / torch.log(torch.tensor(2.0)))


def unmasked(q, k, v, causal):
    return flash_cpu.forward(q, k, v, False)


def of_the_wrong_heads(q, k, v, causal):
    return flash_cpu.forward(q, k.flip(2), v.flip(2), causal)


def summed_twice(*given):
    dq, dk, dv = flash_cpu.backward(*given)
    return dq, 2 * dk, dv


def not_a_number(*given):
    return tuple(x * torch.nan for x in flash_cpu.backward(*given))


@pytest.mark.parametrize("forward", [in_base_two, unmasked, of_the_wrong_heads])
def test_a_wrong_forward_is_refused(forward):
    with pytest.raises(ValueError, match=r"off is off by .* on cpu in torch\.float32 .*use context\.kernel=reference"):
        refuse_inexact(off(forward=forward), CPU, torch.float32)


@pytest.mark.parametrize("backward", [summed_twice, not_a_number])
def test_a_wrong_backward_is_refused(backward):
    with pytest.raises(ValueError, match="kernel off is off by"):
        refuse_inexact(off(backward=backward), CPU, torch.bfloat16)
