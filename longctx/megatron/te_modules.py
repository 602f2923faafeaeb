"""Transformer Engine's linear layers as modules of decoder blocks; imported only where Transformer Engine is installed.

Its layers that read a block's input also apply the norm before them (``layer_norm_weight``).
"""

from megatron.core.extensions import transformer_engine
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from torch import nn

from longctx.megatron.modules import BiasedInput, BiasedOutput, NormedOutput, ScaledOutput

# Loading overwrites all weights.  megatron-core would allocate each layer's whole, unsharded weight in float32 for the
# initial values, even where it is set to draw none.
setattr(transformer_engine, "_initialize_affine_weight_cpu", lambda *_, **__: None)  # noqa: B010


class _Communicates(nn.Module):
    """Adds megatron-core's flag for "the caller communicates" to a layer of Transformer Engine.

    Transformer Engine reads ``parallel_mode`` at every call.  None leaves out all of its collectives.
    """

    _mode: str

    @property
    def explicit_expert_comm(self) -> bool:
        return self.parallel_mode is None

    @explicit_expert_comm.setter
    def explicit_expert_comm(self, caller_communicates: bool) -> None:
        self.parallel_mode = None if caller_communicates else self._mode


class TENormColumnLinear(_Communicates, TELayerNormColumnParallelLinear):
    """A norm and a column-parallel projection."""

    _mode = "column"


class TEBiasedNormColumnLinear(BiasedInput, TENormColumnLinear):
    """A norm and a column-parallel projection with a bias."""


class TEColumnLinear(_Communicates, TEColumnParallelLinear):
    """A column-parallel projection."""

    _mode = "column"


class TEBiasedColumnLinear(BiasedInput, TEColumnLinear):
    """A column-parallel projection with a bias."""


class TERowLinear(_Communicates, TERowParallelLinear):
    """A row-parallel projection."""

    _mode = "row"
    reduction = None  # rounded reductions (`OutputProjection.reduction`) are refused with these layers


class TEBiasedRowLinear(BiasedOutput, TERowLinear):
    """A row-parallel projection with a bias."""


class TENormedRowLinear(NormedOutput, TERowLinear):
    """A row-parallel projection with a normalised output."""


class TEScaledRowLinear(ScaledOutput, TERowLinear):
    """A row-parallel projection with a scaled output."""
