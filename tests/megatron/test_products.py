"""The product of few rows with a weight equals float64's, for views of weights and odd sizes too."""

import pytest
import torch

from longctx.megatron import products
from tests import oracle


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (1, 4), (9, 1)], ids=str)
@pytest.mark.parametrize(("m", "begin", "end"), [(26, 0, 17), (26, 5, 12), (7, 0, 17), (0, 0, 17), (26, 3, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_equal_float64(rows, m, begin, end, biased):
    """Columns ``begin`` to ``end`` of the weight are those of one rank; a rank may have none."""
    weight, bias = torch.randn(m, 17)[:, begin:end], torch.randn(m) if biased else None
    x = torch.randn(*rows, end - begin)
    with torch.inference_mode():
        out = products.linear(x, weight, bias)
    exact = torch.einsum("sbn,mn->sbm", x.double(), weight.double())
    oracle.assert_close(out, exact if bias is None else exact + bias.double(), 1e-6)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("rows", "dtype", "gradients", "batched"),
    [
        (1, torch.float32, False, True),
        (4, torch.float32, False, True),
        (5, torch.float32, False, False),
        (1, torch.bfloat16, False, False),
        (1, torch.float32, True, False),
    ],
)
def test_batched_product_is_for_few_float32_rows_without_gradients(monkeypatch, rows, dtype, gradients, batched):
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args) or bmm(*args))
    weight = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        out = products.linear(torch.randn(rows, 1, 5, dtype=dtype), weight)
    assert (len(calls), out.requires_grad) == (int(batched), gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_rows_are_one_product(dtype):
    """The embedding's output [b s n], seen as [s b n]: PyTorch's linear layer multiplies each row alone."""
    x, weight = torch.randn(1, 5, 6, dtype=dtype).transpose(0, 1), torch.randn(7, 6, dtype=dtype)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = products.linear(x, weight)
    assert "aten::bmm" not in {event.name for event in profile.events()}
    assert torch.equal(out[:, 0], torch.nn.functional.linear(x[:, 0], weight))
