"""Meshes that do not fit are refused before any rank starts, with a message that says what to use instead."""

import importlib.util
import re
from dataclasses import replace

import pytest
import torch

from longctx.attention.backends import kernel_for
from longctx.config import Mesh
from longctx.model_shape import Experts, ModelShape
from longctx.parallel.validate import refuse_no_gpu, refuse_no_te, refuse_other_than_te, refuse_unfit, refuse_unused


def model(heads: int, kv_heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        layers=2, hidden=heads * 8, heads=heads, kv_heads=kv_heads, head_dim=8, ffn=ffn, vocab_size=101,
        max_positions=512, norm_eps=1e-5, tied=True, qkv_bias=False,
    )  # fmt: skip


SMOLLM2 = model(9, 3, 1536)
LLAMA_8B = model(32, 8, 14336)
MIXTURE = replace(model(8, 4, 96), experts=(Experts(6, 2, 36), None))


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (Mesh(), SMOLLM2),
        (Mesh(tp=3), SMOLLM2),
        (Mesh(ulysses=3, ring=5), SMOLLM2),
        (Mesh(tp=2, ulysses=4, ring=3, dp=2), LLAMA_8B),
        (Mesh(tp=8, ring=7), LLAMA_8B),
        (Mesh(tp=2, ring=3, dp=2, ep=6), MIXTURE),
    ],
)
def test_fitting_meshes_are_accepted(mesh, shape):
    refuse_unfit(mesh, shape)


@pytest.mark.parametrize(
    ("mesh", "shape", "message"),
    [
        (
            Mesh(tp=2),
            SMOLLM2,
            "mesh.tp=2 does not divide the model's 9 query heads, 3 KV heads and FFN width 1536; "
            "use mesh.tp=3 (possible: 1, 3)",
        ),
        (
            Mesh(tp=16),
            LLAMA_8B,
            "mesh.tp=16 does not divide the model's 32 query heads, 8 KV heads and FFN width 14336; "
            "use mesh.tp=8 (possible: 1, 2, 4, 8)",
        ),
        (
            Mesh(tp=3),
            model(9, 3, 100),  # divides the heads, but not the FFN
            "mesh.tp=3 does not divide the model's 9 query heads, 3 KV heads and FFN width 100; "
            "use mesh.tp=1 (possible: 1)",
        ),
        (
            Mesh(tp=2),
            replace(model(8, 4, 96), experts=(Experts(8, 2, 35), None)),
            "mesh.tp=2 does not divide the model's 8 query heads, 4 KV heads and FFN width 35 and 96; "
            "use mesh.tp=1 (possible: 1)",
        ),
        (
            Mesh(ring=5, ep=5),
            MIXTURE,
            "mesh.ep=5 does not divide the model's 6 experts; use mesh.ep=6 (possible: 1, 2, 3, 6)",
        ),
        (Mesh(dp=2, ep=2), LLAMA_8B, "mesh.ep=2 divides experts, and this model has none; use mesh.ep=1"),
        (
            Mesh(ulysses=2),
            SMOLLM2,
            "mesh.ulysses=2 cannot share 9 query heads and 3 KV heads evenly; "
            "use mesh.ulysses=1 (possible: 1, 3, 9), and mesh.ring for the other ranks",
        ),
        (
            Mesh(tp=4, ulysses=16),  # 16 divides the model's heads, but not the heads of a tensor-parallel rank
            LLAMA_8B,
            "with mesh.tp=4 each rank has 8 query heads: mesh.ulysses=16 cannot share 8 query heads and "
            "2 KV heads evenly; use mesh.ulysses=8 (possible: 1, 2, 4, 8), and mesh.ring for the other ranks",
        ),
    ],
)
def test_unfit_mesh_is_refused_with_the_nearest_degree(mesh, shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_unfit(mesh, shape)


def test_expert_parallel_ranks_are_ranks_of_other_axes():
    assert Mesh(tp=2, ring=3, dp=2, ep=6).ranks == 12
    with pytest.raises(ValueError, match=r"^mesh\.ep=4 does not divide .* = 6, .* use mesh\.ep=3, or more"):
        Mesh(tp=4, ring=3, dp=2, ep=4)


@pytest.mark.parametrize("axis", ["dp", "pp"])
def test_unused_axes_are_refused(axis):
    message = (
        f"generate has no use for mesh.{axis}=2; use mesh.{axis}=1, and mesh.ring or mesh.ulysses or mesh.tp "
        "to share one prompt between ranks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_unused(Mesh(ring=3, **{axis: 2}), "generate", ("dp", "pp"))


def test_advice_names_no_axis_that_is_refused_too():
    with pytest.raises(ValueError, match=r"use mesh\.tp=1, and mesh\.ring to share one prompt between ranks$"):
        refuse_unused(Mesh(tp=2), "prefill", ("tp", "ulysses", "dp", "pp"))


def test_ulysses_is_checked_against_the_heads_of_a_tensor_parallel_rank():
    """With mesh.tp=2 each rank has 7 query heads and 1 KV head, which 7 Ulysses ranks can share."""
    refuse_unfit(Mesh(tp=2, ulysses=7), model(14, 2, 4864))


def test_used_axes_are_accepted():
    refuse_unused(Mesh(tp=2, ulysses=3, ring=5), "generate", ("dp", "pp"))
    refuse_unused(Mesh(dp=2), "pretrain", ("pp",))


@pytest.mark.parametrize(
    ("cuda", "missing"), [(None, f"torch {torch.__version__} is a CPU build"), ("13.0", "torch finds no GPU")]
)
def test_missing_gpu_is_refused_with_what_is_missing(monkeypatch, cuda, missing):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(ValueError, match=re.escape(f"run.device=cuda: {missing} here; use run.device=cpu")):
        refuse_no_gpu("cuda")
    refuse_no_gpu("cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refuse_no_gpu("cuda")


@pytest.mark.parametrize(("kernel", "dtype"), [("auto", "float32"), ("flash_cuda", "float32"), ("cudnn", "float32")])
def test_refused_combination_on_a_gpu_names_one_that_is_accepted(kernel, dtype):
    with pytest.raises(ValueError, match=r"context\.kernel=") as refused:
        kernel_for(kernel, "cuda", dtype)
    settings = dict(re.findall(r"(kernel|dtype)=(\w+)", str(refused.value).partition("; use ")[2].partition(",")[0]))
    assert settings["dtype"] == "bfloat16"
    assert kernel_for(settings.get("kernel", kernel), "cuda", settings["dtype"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("installed", [False, True])
def test_refusal_of_te_names_what_is_missing_and_how_to_install_it(device, installed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    if installed and device == "cuda":
        refuse_no_te(device)
        return
    with pytest.raises(ValueError, match=r"model\.layers=te needs .*use model\.layers=local") as raised:
        refuse_no_te(device)
    assert ("a GPU (run=gpu)" in str(raised.value)) == (device == "cpu")
    assert ("Transformer Engine (make gpu)" in str(raised.value)) == (not installed)


def test_te_refuses_mixtures_of_experts_only():
    refuse_other_than_te(replace(SMOLLM2, layer_norm=True, norms="post", qk_norm="width", gated=False))
    with pytest.raises(ValueError, match=r"does not support mixtures of experts; use model\.layers=local"):
        refuse_other_than_te(replace(SMOLLM2, experts=(None, Experts(5, 2, 24))))
