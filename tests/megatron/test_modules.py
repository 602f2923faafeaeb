"""The gated feed-forward network and rotary embedding are exact, and make no needless pass over memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.hf.config import shape_of
from longctx.megatron.attention import RotaryTable
from longctx.megatron.model import build_model
from longctx.megatron.modules import FeedForward
from longctx.megatron.spec import record_sharding
from tests.infer.thread_ranks import single_rank
from tests.tiny import tiny_model

S, FFN = 13, 7


class Operations(TorchDispatchMode):
    """Records the names of the operations in its block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_gated_network_adds_nothing_and_gates_in_place(biased, learns):
    """Between the projections.  The input is not overwritten, since a projection may return a view of it."""
    both, bias = torch.randn(S, 1, 2 * FFN, dtype=torch.float64), torch.randn(2 * FFN, dtype=torch.float64)
    before = both.clone()
    mlp = SimpleNamespace(
        config=SimpleNamespace(gated_linear_unit=True, activation_func=F.silu),
        linear_fc1=lambda _: (both, bias if biased else None),
        linear_fc2=lambda x: (x, None),
    )
    with torch.set_grad_enabled(learns), Operations() as operations:
        out, _ = FeedForward.forward(mlp, both)
    gate, up = (before + bias if biased else before).chunk(2, -1)
    torch.testing.assert_close(out, gate / (1 + (-gate).exp()) * up, rtol=1e-12, atol=1e-12)
    assert torch.equal(both, before)
    assert [name for name in operations.names if name not in ("split", "silu")] == [
        *(["add"] if biased else []),
        "mul" if learns else "mul_",
    ]


@pytest.mark.parametrize(("d", "channels"), [(10, 10), (14, 6)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_of_complex_numbers(interleaved, d, channels):
    """A channel and its partner (half of the channels away, or the next channel) form a complex number."""
    angles = torch.rand(S, channels // 2, dtype=torch.float64)
    both = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    x = torch.randn(S, 2, 3, d, dtype=torch.float64, requires_grad=True)
    pairs = x[..., :channels].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    parts = torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2)
    expected = torch.cat([parts, x[..., channels:]], -1)
    rotated = RotaryTable(both.cos(), both.sin(), interleaved).rotate(x)
    torch.testing.assert_close(rotated, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(x)
    got, right = (torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (rotated, expected))
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_weights_record_the_dimension_that_ranks_divide(tmp_path):
    """megatron-core 0.19 records it itself, where it builds the model, and refuses a second time."""
    shape = shape_of(tiny_model(tmp_path / "tiny", max_positions=31))
    with single_rank(tmp_path) as runtime:
        model = build_model(shape, runtime.groups, dtype=torch.float32, layers="local", device=torch.device("meta"))
        record_sharding(model)
    dims = {name.split(".")[-2]: weight.partition_dim for name, weight in model.named_parameters() if weight.dim() > 1}
    inputs = {"linear_proj": 1, "linear_fc2": 1}
    outputs = ("word_embeddings", "linear_qkv", "linear_fc1", "output_layer")
    assert dims == dict.fromkeys(outputs, 0) | inputs
