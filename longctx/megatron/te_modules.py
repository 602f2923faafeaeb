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
    """Adds megatron-core's flag ``explicit_expert_comm`` to a layer of Transformer Engine: the caller communicates.

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
    """Transformer Engine's column-parallel projection, which first normalises its input."""

    _mode = "column"


class TEBiasedNormColumnLinear(BiasedInput, TENormColumnLinear):
    """`TENormColumnLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TEColumnLinear(_Communicates, TEColumnParallelLinear):
    """Transformer Engine's column-parallel projection, without a norm."""

    _mode = "column"


class TEBiasedColumnLinear(BiasedInput, TEColumnLinear):
    """`TEColumnLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TERowLinear(_Communicates, TERowParallelLinear):
    """Transformer Engine's row-parallel projection."""

    _mode = "row"
    reduction = None  # rounded reductions (`OutputProjection.reduction`) are refused with these layers


class TEBiasedRowLinear(BiasedOutput, TERowLinear):
    """`TERowLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TENormedRowLinear(NormedOutput, TERowLinear):
    """`TERowLinear` whose output is normalised before the residual connection."""


class TEScaledRowLinear(ScaledOutput, TERowLinear):
    """`TERowLinear` whose output is multiplied by a scale before the residual connection."""
