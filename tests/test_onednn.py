"""Products by oneDNN equal float64's, and are used where they are faster and nowhere else."""

import inspect

import pytest
import torch

from longctx import onednn
from longctx.megatron import products
from tests import oracle

A, B = torch.randn(307, 211), torch.randn(211, 103)


@pytest.fixture
def faster(monkeypatch):
    """Take oneDNN for all float32 products, whatever this CPU is."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "_LEAST_WORK", 0)
    monkeypatch.setattr(onednn, "_LEAST_INNER", 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (A, B),
        (B.T, A.T),
        (A[::3, 5:90], B[5:90]),
        (A.view(1, 307, 211).expand(2, 307, 211), B),
        (A.T, A),
        (A[:, None], B),
    ],
    ids=["plain", "transposed", "rows and columns", "expanded", "own transpose", "rows of one"],
)
def test_products_of_views_equal_float64(monkeypatch, a, b):
    seen, multiplied = [], onednn._product
    monkeypatch.setattr(onednn, "_product", lambda x, *rest: seen.append(x) or multiplied(x, *rest))
    with torch.inference_mode():
        out = onednn.multiply(a, b)
    oracle.assert_close(out, a.double() @ b.double(), 2e-6)
    assert seen[0].is_contiguous() or seen[0].T.is_contiguous(), "oneDNN is slow for other views"


@pytest.mark.parametrize(
    ("capability", "vendor", "exact", "expected"),
    [
        ("AVX512", "AuthenticAMD", True, True),
        ("AVX512", "GenuineIntel", True, False),
        ("AVX2", "AuthenticAMD", True, False),
        ("AVX512", "AuthenticAMD", False, False),
    ],
)
def test_cpu_decides(monkeypatch, capability, vendor, exact, expected):
    for library in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    if not exact:
        multiply = onednn.multiply
        monkeypatch.setattr(onednn, "multiply", lambda a, b: multiply(a.bfloat16().float(), b.bfloat16().float()))
    assert onednn.is_faster.__wrapped__() == expected


def test_only_large_float32_products_of_a_fast_cpu_take_it(monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    assert onednn.multiplies(torch.ones(1024, 32), torch.ones(32, 32))
    assert not onednn.multiplies(torch.ones(1023, 32), torch.ones(32, 32))
    assert not onednn.multiplies(torch.ones(5000, 32), torch.ones(32, 31))
    assert not onednn.multiplies(torch.ones(5000, 31), torch.ones(31, 32))
    assert not onednn.multiplies(torch.ones(1024, 32), torch.ones(1024, 32, 32))
    assert onednn.multiplies(torch.ones(1024, 32), torch.ones(64, 32)[32:].T)
    assert not onednn.multiplies(torch.ones(1024, 32), torch.ones(32, 64)[:, 32:]), "oneDNN is slow for such views"
    for dtype in (torch.float64, torch.bfloat16):
        assert not onednn.multiplies(torch.ones(1024, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype))
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    assert not onednn.multiplies(torch.ones(1024, 32), torch.ones(32, 32))


@pytest.mark.parametrize(("rows", "gradients", "calls"), [(5, False, 1), (4, False, 0), (5, True, 0)])
def test_inference_multiplies_more_than_a_few_rows_by_it(faster, monkeypatch, rows, gradients, calls):
    seen, multiply = [], products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args: seen.append(args) or multiply(*args))
    x, bias = A[:rows, None], torch.randn(103)
    with torch.set_grad_enabled(gradients):
        out = products.linear(x, B.T, bias)
    assert len(seen) == calls
    oracle.assert_close(out, x.double() @ B.double() + bias.double(), 2e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_megatron_cores_linear_functions_have_the_gradients_of_float64(faster, monkeypatch, frozen, biased):
    seen, multiply = [], onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *args: seen.append(args) or multiply(*args))
    name = "LinearWithFrozenWeight" if frozen else "LinearWithGradAccumulationAndAsyncCommunication"
    function = getattr(products.megatron_layers, name)
    stock = getattr(function, "stock", function)
    function = products._by_onednn(stock)
    inputs = [A.view(307, 1, 211), B.T.contiguous(), torch.randn(103) if biased else None]
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    options = (False, None) if frozen else (False, False, False, None, 0, None)
    options += (1,) * (len(inspect.signature(stock.forward).parameters) - 4 - len(options))  # 0.19: gtp_remat_size
    out = function.apply(*inputs, *options)
    expected = torch.nn.functional.linear(*exact)
    oracle.assert_close(out, expected, 2e-6)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert len(seen) == (2 if frozen else 3), "forward, gradient of the rows, gradient of the weight"
    for got, right in zip(inputs[: 1 if frozen else 3], exact, strict=False):
        assert got is None or oracle.assert_close(got.grad, right.grad, 2e-6) is None


def test_linear_functions_are_replaced_once(faster, monkeypatch):
    names = ("LinearWithGradAccumulationAndAsyncCommunication", "LinearWithFrozenWeight")
    for name in names:
        function = getattr(products.megatron_layers, name)
        monkeypatch.setattr(products.megatron_layers, name, getattr(function, "stock", function))
    stock = [getattr(products.megatron_layers, name) for name in names]
    products.train_by_onednn()
    products.train_by_onednn()
    assert [getattr(products.megatron_layers, name).stock for name in names] == stock
