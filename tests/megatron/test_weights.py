"""What a folder of tensors must hold, and how they are told apart: loading a wrong one would run, and be wrong."""

import pytest
import torch
from safetensors.torch import save_file

from longctx.megatron.weights import Weights, fuse_qkv


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        Weights(tmp_path)("lm_head.weight")


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"w": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"w is torch\.float8_e4m3fn: use an unquantised checkpoint"):
        Weights(tmp_path)("w")


def test_tensors_that_nothing_reads_are_refused(tmp_path):
    names = ["read", "model.layers.0.self_attn.q_norm.weight", "model.rotary_emb.inv_freq", "lm_head.weight"]
    save_file({name: torch.ones(3) for name in names}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    weights("read")
    with pytest.raises(ValueError, match=r"no part of the model takes: \['model.layers.0.self_attn.q_norm.weight'\]"):
        weights.refuse_unread(tied=True)
    with pytest.raises(ValueError, match="lm_head"):
        weights.refuse_unread(tied=False)


def test_qkv_is_fused_group_by_group():
    """Three groups of two query heads, heads of 5: each group's queries, then its key, then its value."""
    q, k, v = (torch.arange(n * 5.0) + first for n, first in ((6, 0), (3, 100), (3, 200)))
    fused = fuse_qkv(q, k, v, groups=3).view(3, 4, 5)
    for group in range(3):
        assert torch.equal(fused[group, :2].flatten(), q[10 * group : 10 * group + 10])
        assert torch.equal(fused[group, 2], k[5 * group : 5 * group + 5])
        assert torch.equal(fused[group, 3], v[5 * group : 5 * group + 5])
