"""Training on CPUs does not use the optimizers of Transformer Engine, which need CUDA."""

import importlib

import pytest
import torch

from longctx.megatron.cpu_shim import _CudaToCpu, use_torch_optimizers

NAMES = {
    "megatron.core.optimizer": ("Adam", "SGD", "USING_PYTORCH_OPTIMIZER"),
    "megatron.core.optimizer.clip_grads": ("multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl"),
    "megatron.core.optimizer.optimizer": ("multi_tensor_applier", "multi_tensor_scale_impl"),
    "megatron.core.optimizer.distrib_optimizer": ("Adam", "USING_TE_OPTIMIZER"),
}


def needs_cuda(*_, **__):
    raise RuntimeError("CUDA driver version is insufficient")


@pytest.fixture
def with_transformer_engine(monkeypatch):
    """megatron-core's modules as they are after an import with Transformer Engine installed."""
    for module, names in NAMES.items():
        for name in names:
            # monkeypatch puts back what is there now, also where the function under test has set it.
            monkeypatch.setattr(importlib.import_module(module), name, needs_cuda)


def test_everything_taken_from_transformer_engine_is_replaced(with_transformer_engine):
    use_torch_optimizers()
    found = {f"{m}.{name}": getattr(importlib.import_module(m), name) for m, names in NAMES.items() for name in names}
    assert needs_cuda not in found.values(), found
    assert found["megatron.core.optimizer.Adam"] is torch.optim.AdamW
    assert found["megatron.core.optimizer.USING_PYTORCH_OPTIMIZER"] is True


def test_gradients_are_clipped_on_cpu(with_transformer_engine):
    use_torch_optimizers()
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    grads, overflow = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], torch.zeros(1, dtype=torch.int)
    with _CudaToCpu():  # as in training
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
    assert float(norm) == 5.0
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, overflow, [grads, grads], 0.5)
    assert [x.tolist() for x in grads] == [[1.5, 0.0], [2.0]]
