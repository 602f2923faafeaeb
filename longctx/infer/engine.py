"""The `Engine`: a loaded model on its ranks, with the groups of ranks that share a sequence."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longctx.attention.backends import checked_kernel
from longctx.attention.kernel import Kernel
from longctx.config import ModelSource, Reduce
from longctx.infer.cache import KVCache
from longctx.megatron.hf_io import load as hf_load
from longctx.megatron.model import GPTModel, build_model, layers_in_use, logits
from longctx.megatron.reduce import set_reductions
from longctx.megatron.runtime import Runtime
from longctx.megatron.sharded import WeightShare, share_weights
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.ring import Strategy
from longctx.shapes import Float, Tensor
from longctx.spd.plan import SPDPlan

ATTENTION = "attention"  # purpose under which the context group counts attention's exchanges


@dataclass(frozen=True)
class Engine:
    """A loaded model, and the ulysses x ring ranks that share a sequence.

    ``context`` is the group of these ranks: rank = ring rank * ulysses size + ulysses rank.  It carries control
    messages and decoding's collectives; only the latter are counted as `ATTENTION`.  ``layers`` is the implementation
    of the model's layers: "local" for megatron-core's, "te" for Transformer Engine's.  ``share`` is this rank's share
    of the weights for ``context.decode=sharded``.  It is None with one context rank, with "te" layers, and with rounded
    reductions.  It is also None if blocks drop a reduction over other ranks than the context ranks.  ``reduce`` has the
    dtypes of rounded reductions (None: no reduction is rounded).
    """

    model: GPTModel
    shape: ModelShape
    kernel: Kernel
    tp: Comm = field(default_factory=SingleRankComm)
    ulysses: Comm = field(default_factory=SingleRankComm)
    ring: Comm = field(default_factory=SingleRankComm)
    context: Comm = field(default_factory=SingleRankComm)
    layers: str = "local"
    share: WeightShare | None = None
    reduce: Reduce | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def rank(self) -> int:
        """Number of this rank among those that share the sequence."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    @property
    def ranks(self) -> int:
        """Number of ranks that share the sequence."""
        return self.ring.size * self.ulysses.size

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent for attention, and for the linear layers in sharded decoding."""
        merged = self.context.traffic.purposes.get(ATTENTION, 0)
        summed = self.share.tp_context.traffic.total if self.share else 0
        return self.ulysses.traffic.total + self.ring.traffic.total + merged + summed

    @property
    def row_bytes(self) -> int:
        """Bytes of a cached row on this rank: keys and values of its heads, in all layers."""
        return self.shape.cached_row_bytes(self.tp.size, self.ulysses.size, self.dtype.itemsize)

    def everywhere(self, strategy: Strategy) -> dict[int | None, Strategy]:
        """Return ``strategies`` for `run_pass`: a dictionary from each window of the model's layers to ``strategy``."""
        return dict.fromkeys(self.shape.windows, strategy)

    def share_of(self, tokens: int) -> int:
        """Return the rows that this rank caches of ``tokens``, if the ring shares them evenly, and two more."""
        return -(-tokens // self.ring.size) + 2

    def cache(self, tokens: int) -> KVCache:
        """Return an empty cache with room for this rank's share of ``tokens``."""
        return KVCache(self.ring.size, self.ring.rank, self.share_of(tokens))


@torch.inference_mode()
def next_logits(
    engine: Engine, hidden: Float[Tensor, "s b hidden"], share: WeightShare | None = None
) -> Float[Tensor, "s b v"]:
    """Compute the logits of the rows of ``hidden``; all tensor-parallel ranks must call this.

    Logits are float32, or float64 for a model in float64.  With a ``share``, all context ranks must call this with the
    same rows; each rank multiplies a part of the weights, and all get the logits.
    """
    if not len(hidden):
        return hidden.new_empty(0, 1, engine.shape.vocab_size)  # megatron-core's layers cannot take zero rows
    with engine.context.traffic.counted_as(ATTENTION):  # the context ranks exchange logits only with a share
        return logits(engine.model, hidden, engine.tp, engine.shape.vocab_size, share)


def load_engine(
    runtime: Runtime,
    model: ModelSource,
    shape: ModelShape,
    folder: Path,
    kernel: str,
    plan: SPDPlan | None = None,
    reduce: Reduce | None = None,
) -> Engine:
    """Load ``model`` from ``folder``, sharded over the mesh of ``runtime``; all ranks must call this.

    ``plan`` has the blocks that drop a reduction, ``reduce`` the dtypes of reductions (None: all exact).  With
    ``reduce``, or with a plan for another tensor-parallel degree than the mesh's, the layers are "local", and
    ``model.layers=te`` is refused.

    Raises ValueError if ``kernel`` does not take the device, dtype or head dimension, or if ``model.layers`` cannot be
    used.  It does so, too, if a tensor is missing or left over in ``folder``.
    """
    # Only megatron-core's layers support rounded reductions, and dropped reductions in sharded decoding.
    local = bool(reduce or (plan and plan.tp != runtime.tp.size))
    if local and model.layers == "te":
        raise ValueError(
            "model.layers=te supports neither rounded reductions nor dropped reductions in sharded decoding: use "
            "model.layers=local"
        )
    layers = "local" if local else layers_in_use(model.layers, shape)
    net = _load_model(runtime, runtime.groups, model, shape, folder, layers, plan)
    comms = (runtime.tp, runtime.ulysses, runtime.ring, runtime.context)
    share, n = None, runtime.context.size
    drops_over_others = plan and plan.dropped and (runtime.tp.size, plan.tp) != (1, n)
    if reduce:
        set_reductions(net, runtime.tp, reduce)
    elif layers == "local" and n > 1 and not drops_over_others:
        share = share_weights(net, shape, runtime.context, runtime.tp_context)
    checked = checked_kernel(kernel, runtime.device, model.dtype, shape.head_dim, runtime.slowest)
    return Engine(net, shape, checked, *comms, layers, share, reduce)


def load_alone(runtime: Runtime, engine: Engine, model: ModelSource, folder: Path) -> Engine:
    """Return an `Engine` with the model of ``engine``, without context parallelism, to compare logits with.

    This rank alone runs the whole model.  With tensor parallelism it loads all weights from ``folder``; without, it
    reuses those of ``engine``.  The exception is a model with dropped or rounded reductions, which depends on its
    tensor-parallel degree.  It stays sharded, and all ranks of this rank's tensor-parallel group run it.
    """
    net = engine.model
    if isinstance(net.decoder.layers[0], SPDTransformerLayer) or engine.reduce:
        return replace(engine, ulysses=SingleRankComm(), ring=SingleRankComm(), context=SingleRankComm(), share=None)
    if runtime.mesh.tp > 1:
        net = _load_model(runtime, runtime.alone, model, engine.shape, folder, engine.layers)
    return Engine(net, engine.shape, engine.kernel, layers=engine.layers)


def _load_model(
    runtime: Runtime,
    groups: Any,
    model: ModelSource,
    shape: ModelShape,
    folder: Path,
    layers: str,
    plan: SPDPlan | None = None,
) -> GPTModel:
    dtype = getattr(torch, model.dtype)
    net = build_model(shape, groups, dtype=dtype, layers=layers, device=runtime.device, plan=plan, fp8=model.fp8)
    hf_load.load(net, hf_load.Weights(folder, plan.dropped if plan else ()), shape)
    return net


def barrier(engine: Engine) -> None:
    """Wait until all ranks of the context group call this, so that a clock started next excludes their earlier work."""
    engine.context.all_gather(torch.zeros(1, device=engine.device), [(1,)] * engine.ranks)
