"""A loaded model on its ranks: what every inference recipe builds first."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.attention.backends import checked_kernel
from longctx.attention.kernel import Kernel
from longctx.config import ModelSource
from longctx.infer.cache import KVCache
from longctx.megatron.hf_io import load as hf_load
from longctx.megatron.model import GPTModel, build_model, layers_in_use
from longctx.megatron.runtime import Runtime
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.ring import Strategy
from longctx.spd.plan import SPDPlan


ATTENTION = "attention"  # the purpose that attention's exchanges over the context group are counted as


@dataclass(frozen=True)
class Engine:
    """A model, and the ranks that share its sequence: ulysses x ring, rank = ring rank * U + ulysses rank.

    ``context`` is the group of both together; its traffic counts attention's exchanges apart from control
    messages.  ``layers`` says whose layers it is made of: megatron-core's ``local`` ones or Transformer Engine's
    (``te``).
    """

    model: GPTModel
    shape: ModelShape
    kernel: Kernel
    tp: Comm = field(default_factory=SingleRankComm)
    ulysses: Comm = field(default_factory=SingleRankComm)
    ring: Comm = field(default_factory=SingleRankComm)
    context: Comm = field(default_factory=SingleRankComm)
    layers: str = "local"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def rank(self) -> int:
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    @property
    def ranks(self) -> int:
        return self.ring.size * self.ulysses.size

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent to others for attention."""
        merged = self.context.traffic.purposes.get(ATTENTION, 0)
        return self.ulysses.traffic.total + self.ring.traffic.total + merged

    def everywhere(self, strategy: Strategy) -> dict[int | None, Strategy]:
        """``strategy`` for the layers of every window: what `run_pass` takes."""
        return dict.fromkeys(self.shape.windows, strategy)

    def cache(self, tokens: int, more: int = 0) -> KVCache:
        """An empty cache with room for this rank's share of ``tokens``, and for so many ``more`` of its own."""
        return KVCache(self.ring.size, self.ring.rank, -(-tokens // self.ring.size) + 2 + more)


def load_engine(
    here: Runtime,
    model: ModelSource,
    shape: ModelShape,
    folder: Path,
    kernel: str,
    plan: SPDPlan | None = None,
) -> Engine:
    """``model``, sharded over ``here``'s mesh, with its weights read from ``folder``; its blocks follow ``plan``."""
    layers = "local" if plan else layers_in_use(model.layers)
    built = _loaded(here, here.groups, model, shape, folder, layers, plan)
    comms = (here.tp, here.ulysses, here.ring, here.context)
    return Engine(built, shape, checked_kernel(kernel, here.device, model.dtype, shape.head_dim), *comms, layers)


def load_alone(here: Runtime, engine: Engine, model: ModelSource, folder: Path) -> Engine:
    """The same model on this rank by itself; ``engine``'s own where it holds all of it.

    With dropped reductions it is no function of a single rank: then on these tensor-parallel ranks by themselves.
    """
    built = engine.model
    if isinstance(built.decoder.layers[0], SPDTransformerLayer):
        return Engine(built, engine.shape, engine.kernel, tp=engine.tp, layers=engine.layers)
    if here.mesh.tp > 1:
        built = _loaded(here, here.alone, model, engine.shape, folder, engine.layers)
    return Engine(built, engine.shape, engine.kernel, layers=engine.layers)


def _loaded(
    here: Runtime,
    groups: Any,
    model: ModelSource,
    shape: ModelShape,
    folder: Path,
    layers: str,
    plan: SPDPlan | None = None,
) -> GPTModel:
    dtype = getattr(torch, model.dtype)
    built = build_model(shape, groups, dtype=dtype, layers=layers, device=here.device, plan=plan)
    hf_load.load(built, hf_load.Weights(folder, plan.dropped if plan else ()), shape)
    return built
