"""Predicted memory of a training step against the counted bytes of a decoder made of torch's operations."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longctx.attention.flash_cpu import flash_cpu
from longctx.attention.layout import zigzag
from longctx.config import Mesh
from longctx.cost.forward import Numbers
from longctx.cost.memory import inference_bytes, step_bytes
from longctx.cost.step import StepWork
from longctx.model_shape import Experts, ModelShape
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.cross_entropy import ALLOCATORS, cross_entropy
from longctx.parallel.measure.memory import MemoryMeter
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention

SHAPE = ModelShape(3, 192, 9, 3, 64, 512, 97, 512, 1e-5, True, False)
NONE = StepWork(307, 1, loss_rows=64, operations="cpu")


class Decoder:
    """A Llama of ``shape`` for a training step of ``work``; gradients of weights are dropped when they are complete."""

    def __init__(self, shape: ModelShape, work: StepWork) -> None:
        self.shape, self.work = shape, work
        hidden, ffn, width = shape.hidden, shape.ffn, shape.heads * shape.head_dim
        qkv, out = (width + 2 * shape.kv_heads * shape.head_dim, hidden), (hidden, width)
        sizes = {"qkv": qkv, "out": out, "fc1": (2 * ffn, hidden), "fc2": (hidden, ffn)}
        sizes |= {"norm1": (hidden,), "norm2": (hidden,)}
        layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.layers, self.embedding, self.norm = layers, weight(shape.vocab_size, hidden), weight(hidden)
        self.angles = torch.rand(2, work.length, 1, 1, shape.head_dim // 2)
        self.partials: list[list] = [[] for _ in layers]

    def rotate(self, x):
        (first, second), (cos, sin) = x.chunk(2, -1), self.angles
        return torch.cat([(first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)], -1)

    def attention(self, weights, partials, x):
        shape, rows = self.shape, len(x)
        group, layout = shape.heads // shape.kv_heads, zigzag(rows, 1)
        qkv = F.linear(F.rms_norm(x, x.shape[-1:], weights["norm1"]), weights["qkv"])
        split = [group * shape.head_dim, shape.head_dim, shape.head_dim]
        q, k, v = qkv.view(rows, 1, shape.kv_heads, -1).split(split, 3)
        q, k = self.rotate(q.reshape(rows, 1, shape.heads, -1)), self.rotate(k)
        saved = partials if self.work.recompute != "none" else None
        attend = ring_attention(Ring(SingleRankComm(), layout, layout), flash_cpu, STRATEGIES["pass_kv"], None, saved)
        out = F.pad(attend(*(y.transpose(0, 1) for y in (q, k, v))), (0, 0, 0, 0, 0, 0))
        return x + F.linear(out.transpose(0, 1).flatten(2), weights["out"])

    def feed_forward(self, weights, x):
        gate, up = F.linear(x, weights["fc1"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, weights["fc2"])

    def layer(self, weights, partials, x):
        x = self.attention(weights, partials, x)
        normed, network = F.rms_norm(x, x.shape[-1:], weights["norm2"]), partial(self.feed_forward, weights)
        if not self.work.mlp_rows:
            return x + network(normed)
        tiles = normed.split(self.work.mlp_rows)
        return x + torch.cat([checkpoint(network, tile, use_reentrant=True) for tile in tiles])

    def step(self, tokens):
        x = F.embedding(tokens, self.embedding).unsqueeze(1)
        for weights, partials in zip(self.layers, self.partials, strict=True):
            layer = partial(self.layer, weights, partials)
            x = checkpoint(layer, x, use_reentrant=True) if self.work.recompute == "full" else layer(x)
        x = F.rms_norm(x, x.shape[-1:], self.norm).squeeze(1)
        counts = torch.ones(len(tokens))
        loss, _ = cross_entropy(
            x, self.embedding, tokens, counts, SingleRankComm(), self.shape.vocab_size, rows=self.work.loss_rows
        )
        del x
        loss.backward()


def weight(*size):
    """Return a parameter whose gradient is dropped as soon as it is complete, as megatron-core adds it to a buffer."""
    parameter = torch.nn.Parameter(torch.randn(size) / 50)
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return parameter


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("shape", "work"),
    [
        (SHAPE, NONE),
        (SHAPE, replace(NONE, recompute="full")),
        (SHAPE, replace(NONE, recompute="full", mlp_rows=32)),
        (SHAPE, replace(NONE, mlp_rows=32)),
        (replace(SHAPE, hidden=576, ffn=1536), NONE),
        (replace(SHAPE, vocab_size=8191), NONE),
        (replace(SHAPE, vocab_size=2039), replace(NONE, loss_rows=None)),
    ],
    ids=["none", "full", "full, tiled", "tiled", "wide", "logits", "all logits"],
)
def test_activations_and_logits_are_those_of_torch(shape, work):
    decoder, tokens = Decoder(shape, work), torch.randint(shape.vocab_size, (work.length,))
    with MemoryMeter({"logits": ALLOCATORS}) as meter:
        decoder.step(tokens)
    parts = step_bytes(shape, Mesh(), work, "pass_kv", Numbers(4, 4))
    predicted = {part: parts[part] for part in ("activations", "logits")}
    assert sum(predicted.values()) == pytest.approx(sum(meter.peak.values()), rel=0.05)
    for part, size in predicted.items():
        assert size == pytest.approx(meter.peak[part], rel=0.1, abs=0.01 * sum(meter.peak.values())), part


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ring=3)])
def test_what_has_no_formula_is_refused(mesh):
    with pytest.raises(ValueError, match="strategy=ring has no formula: use pass_kv"):
        inference_bytes(SHAPE, mesh, [9], [0], "ring", Numbers())
    with pytest.raises(ValueError, match="strategy=ring has no formula: use pass_kv"):
        step_bytes(SHAPE, mesh, NONE, "ring", Numbers())
    with pytest.raises(ValueError, match="numbers of 8 bytes has no formula"):
        step_bytes(SHAPE, mesh, NONE, "pass_kv", Numbers(8, 8))


def test_pipeline_stage_with_experts_counts_if_it_needs_most():
    """In a model whose first layers are dense, the last stage is that of a model with experts in all layers."""
    mixture = Experts(8, 2, 512)
    fields = {"layers": 4, "windows": (None,) * 4, "rotaries": SHAPE.rotaries[:1] * 4}
    mixed = replace(SHAPE, **fields, experts=(None, None, mixture, mixture))
    alike = replace(SHAPE, **fields, experts=(mixture,) * 4)
    one, other = (
        step_bytes(shape, Mesh(pp=2), NONE, "pass_kv", Numbers(4, 4))["activations"] for shape in (mixed, alike)
    )
    assert one == pytest.approx(other)
