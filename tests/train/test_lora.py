"""Adapters: loss and gradients equal those of transformers with merged weights; runs resume on another mesh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.config import LoRA, Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import random_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.ranks import Run, train, train_each
from tests.train.test_step import exact

LENGTHS = ((13, 0, 22, 2), (37,))
SCALE = 2 / 3  # alpha / rank
HEADS, KV_HEADS = 8, 4
MESHES = [
    (Mesh(), {}),
    (Mesh(tp=2), {"recompute": "selective"}),
    (Mesh(pp=2), {"recompute": "full"}),
    (Mesh(tp=2, ring=2), {"mlp_rows": 3, "recompute": "full"}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tiny_model(
        tmp_path_factory.mktemp("lora") / "tiny", max_positions=97, heads=HEADS, kv_heads=KV_HEADS, ffn=52
    )
    return Run(Mesh(), folder, LENGTHS, lora=LoRA(rank=3, alpha=2.0), dtype="float64")


def by_layer(gradients: dict[str, Tensor], layer: int, kv_heads: int) -> dict[str, list[Tensor]]:
    """Gradients of the weights beside each adapter, a list for the tensors that alternate by rank."""

    def of(name: str) -> Tensor:
        return gradients[f"model.layers.{layer}.{name}.weight"]

    q, k, v = (of(f"self_attn.{x}_proj").unflatten(0, (kv_heads, -1)) for x in "qkv")
    gated = f"model.layers.{layer}.mlp.gate_proj.weight" in gradients
    return {
        "linear_qkv": [torch.cat([q, k, v], 1).flatten(0, 1)],
        "linear_proj": [of("self_attn.o_proj")],
        "linear_fc1": [of("mlp.gate_proj"), of("mlp.up_proj")] if gated else [of("mlp.c_fc")],
        "linear_fc2": [of("mlp.down_proj" if gated else "mlp.c_proj")],
    }


@pytest.mark.parametrize(("mesh", "settings"), MESHES, ids=str)
def test_loss_and_gradients_equal_those_of_transformers(run: Run, mesh: Mesh, settings: dict, tmp_path: Path) -> None:
    run = replace(run, mesh=mesh, gradients=tmp_path / "merged", **settings)
    assert_adapters_are_exact(run, run_ranks(mesh.ranks, train, run), KV_HEADS)


def test_families_equal_transformers(tmp_path: Path) -> None:
    """Norms after projections, factors, biases, norms over all heads, and a network without a gate."""
    runs = []
    for kind in ("gemma3", "granite", "llama with all biases", "olmo2", "starcoder2"):
        folder = random_model(kind, tmp_path / kind)
        tiny_tokenizer().save_pretrained(folder)
        merged = tmp_path / f"{kind} merged"
        settings = {"lora": LoRA(rank=3, alpha=2.0), "dtype": "float64", "tokens": 211, "gradients": merged}
        runs.append(Run(Mesh(tp=2), folder, LENGTHS, **settings))
    for run, *ranks in zip(runs, *run_ranks(2, train_each, runs), strict=True):
        assert_adapters_are_exact(run, ranks, kv_heads=2)


def assert_adapters_are_exact(run: Run, ranks: list[Any], kv_heads: int) -> None:
    """With W' = W + s B A: dA = s B^T dW' and dB = s dW' A^T, where dW' is transformers'."""
    loss, gradients = exact(replace(run, folder=run.gradients))
    found = {}
    for of_rank in ranks:
        assert of_rank[0] == pytest.approx(loss, rel=1e-12)
        found |= of_rank[2]
    tokens = ranks[0][1]
    scale = SCALE * float(1.0 / torch.tensor(tokens)) * tokens  # megatron-core divides by the tokens in float32
    layers = {name[0] for name in found}
    assert len(found) == 4 * len(layers) and len(layers) >= 2
    for name, matrices in found.items():
        layer, target = name.split()
        (down, down_gradient), *ups = matrices.values()
        of_weights = by_layer(gradients, int(layer) - 1, kv_heads)[target]
        for (_, up_gradient), of_weight in zip(ups, of_weights, strict=True):
            torch.testing.assert_close(up_gradient, scale * of_weight @ down.T, rtol=1e-9, atol=1e-12)
        expected = sum(scale * up.T @ of_weight for (up, _), of_weight in zip(ups, of_weights, strict=True))
        torch.testing.assert_close(down_gradient, expected, rtol=1e-9, atol=1e-12)


def test_run_resumes_on_another_mesh(run: Run, tmp_path: Path) -> None:
    optim = Optim(lr=1e-2, decay_steps=4, warmup=3)
    whole = replace(run, optim=optim, steps=4, dtype="float32")
    expected = run_ranks(1, train, whole)[0]
    run_ranks(2, train, replace(whole, mesh=Mesh(tp=2), steps=2, checkpoints=tmp_path, save_at=2))
    resumed = run_ranks(2, train, replace(whole, mesh=Mesh(ring=2), checkpoints=tmp_path, begin=2))[0]
    for step, reference in zip(resumed, expected[2:], strict=True):
        assert (step.loss, step.norm) == pytest.approx((reference.loss, reference.norm), rel=2e-6)
