"""The GPU kernels hand every tensor to the right argument in the right layout; checked with simulated ops on CPU."""

import pytest
import torch

from longctx.attention.verify import refuse_inexact
from tests.attention.simulated_ops import simulated

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["flash_cuda", "cudnn", "flash_attn"])
def test_adapter_of_kernel_is_exact(kernel, dtype):
    with simulated(kernel) as adapter:
        refuse_inexact(adapter, CPU, dtype, head_dim=24)


MUTATIONS = [
    ("flash_cuda", "q.contiguous(), k.contiguous(), v.contiguous()", "q.contiguous(), v.contiguous(), k.contiguous()"),
    ("flash_cuda", "(None, None, q.shape[1], k.shape[1])  #", "(None, None, k.shape[1], q.shape[1])  #"),
    ("flash_cuda", "Partial(out.float(), lse.transpose(1, 2))", "Partial(out.float(), lse)"),
    ("flash_cuda", "(dout, q, k, v, out, lse,", "(out, q, k, v, dout, lse,"),
    ("flash_cuda", "*rows, 0.0, causal, *no_dropout", "*rows, 0.0, False, *no_dropout"),
    ("flash_cuda", "dq, dk, dv = _backward_op", "dq, dv, dk = _backward_op"),
    ("flash_cuda", "return dq.float(), dk.float()", "return dq.float(), 2 * dk.float()"),
    ("cudnn", "x.repeat_interleave(heads // x.shape[2], 2)", "x.repeat(1, 1, heads // x.shape[2], 1)"),
    ("cudnn", "None, True, 0.0, causal", "None, False, 0.0, causal"),
    ("cudnn", "None, None, None, q.shape[2], sk", "None, None, None, sk, q.shape[2]"),
    ("cudnn", ".unsqueeze(-1)", ""),
    ("cudnn", "dk.view(b, sk, hk, -1, d).sum(3)", "dk.view(b, sk, hk, -1, d).mean(3)"),
    ("cudnn", "dv.view(b, sk, hk, -1, d)", "dv.view(b, sk, -1, hk, d).transpose(2, 3)"),
    ("cudnn", "Partial(_heads_first(out).float()", "Partial(out.view(q.shape).float()"),
    ("flash_attn", "softmax_scale=q.shape[-1] ** -0.5", "softmax_scale=1.0"),
    ("flash_attn", "(dout, q, k, v, out, lse, dq, dk, dv,", "(out, q, k, v, dout, lse, dq, dk, dv,"),
    ("flash_attn", "lse, dq, dk, dv, **options", "lse, dq, dv, dk, **options"),
    ("flash_attn", '"window_size_left": -1', '"window_size_left": 0'),
    ("flash_attn", "lse.transpose(1, 2).contiguous()", "lse.contiguous()"),
]


@pytest.mark.parametrize(("kernel", "old", "new"), MUTATIONS)
def test_mistake_in_an_adapter_is_noticed(kernel, old, new):
    errors = (ValueError, AssertionError, RuntimeError, TypeError)
    with simulated(kernel, old, new) as adapter, pytest.raises(errors):
        refuse_inexact(adapter, CPU, torch.bfloat16, head_dim=24)
