"""A loaded model on its ranks: what every inference recipe builds first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longctx.attention.backends import kernel_for
from longctx.infer.prefill import Engine
from longctx.megatron import weights
from longctx.megatron.model import GPTModel, build_model, layers_in_use
from longctx.megatron.runtime import Runtime
from longctx.parallel.comm import Alone
from longctx.schema import ModelShape, ModelSource


def load_engine(here: Runtime, model: ModelSource, shape: ModelShape, folder: Path, kernel: str) -> Engine:
    """``model``, sharded over ``here``'s mesh, with its weights read from ``folder``."""
    layers = layers_in_use(model.layers)
    built = _loaded(here, here.groups, model, shape, folder, layers)
    return Engine(built, shape, here.tp, here.ulysses, here.ring, kernel_for(kernel, here.device.type), layers)


def load_alone(here: Runtime, engine: Engine, model: ModelSource, folder: Path) -> Engine:
    """The same model on this rank by itself; ``engine``'s own where it holds all of it."""
    built = engine.model
    if here.mesh.tp > 1:
        built = _loaded(here, here.alone, model, engine.shape, folder, engine.layers)
    return replace(engine, model=built, tp=Alone(), ulysses=Alone(), ring=Alone())


def _loaded(here: Runtime, groups: Any, model: ModelSource, shape: ModelShape, folder: Path, layers: str) -> GPTModel:
    built = build_model(shape, groups, dtype=getattr(torch, model.dtype), layers=layers, device=here.device)
    weights.load(built, weights.Weights(folder), shape)
    return built
