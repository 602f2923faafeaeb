"""Choice of kernels: which packages count as installed, and what the adapters hand to CUDA kernels."""

import importlib.util
from types import ModuleType

import pytest
import torch

from longctx.attention import cudnn as cudnn_module
from longctx.attention import flash_attn


def loaded_again(module: ModuleType) -> ModuleType:
    """Return a second copy of ``module``, which looks for its package again."""
    spec = importlib.util.spec_from_file_location("second_copy", str(module.__file__))
    assert spec and spec.loader
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_flash_attn_4_alone_is_not_flash_attn(tmp_path, monkeypatch):
    """It installs a folder flash_attn without an __init__.py, which Python finds as a namespace package."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert importlib.util.find_spec("flash_attn") is not None
    assert not loaded_again(flash_attn).installed
    (tmp_path / "flash_attn_2_cuda.py").touch()
    importlib.invalidate_caches()
    assert loaded_again(flash_attn).installed


@pytest.mark.parametrize(("begin", "heads"), [(1, 1), (18, 1), (18, 3)])
def test_cudnn_gets_aligned_log_sum_exps(monkeypatch, begin, heads):
    """The log-sum-exp of a tile that begins at any row of the block."""
    given = []

    def backward(dout, q, k, v, out, lse, *_):
        given.append(lse)
        return q, k, v

    monkeypatch.setattr(cudnn_module, "_backward_op", backward)
    q = torch.zeros(1, 37, heads, 8, dtype=torch.bfloat16)
    lse = torch.arange(37.0 * heads).view(1, 37, heads)
    assert lse.data_ptr() % 16 == 0
    tile = slice(begin, 37)
    q_t, lse_t = q[:, tile], lse[:, tile]
    cudnn_module.cudnn.backward(q_t, q_t, q_t, q_t, q_t, lse_t, True)
    assert given[0].shape == (1, heads, 37 - begin, 1) and given[0].is_contiguous()
    assert torch.equal(given[0][..., 0], lse_t.transpose(1, 2))
    assert given[0].data_ptr() % 16 == 0
