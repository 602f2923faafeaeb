"""Transformer Engine's linear layers as modules of decoder blocks; imported only where Transformer Engine is installed.

Its layers that read a block's input also apply the norm before them (``layer_norm_weight``).
"""

import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from longctx.megatron.modules import BiasedInput, BiasedOutput, NormedOutput, ScaledOutput
from longctx.parallel.validate import FP8_MULTIPLE

# Loading overwrites all weights.  megatron-core would allocate each layer's whole, unsharded weight in float32 for the
# initial values, even where it is set to draw none.
setattr(transformer_engine, "_initialize_affine_weight_cpu", lambda *_, **__: None)  # noqa: B010


class _Linear(nn.Module):
    """A linear layer of Transformer Engine that takes any number of rows, with ``explicit_expert_comm``.

    That is megatron-core's flag for layers whose caller communicates.  Transformer Engine reads ``parallel_mode`` at
    every call; None leaves out all of its collectives.

    With FP8, Transformer Engine multiplies multiples of 8 or 16 rows only.  Others are padded with zeros.  Under
    sequence parallelism the caller has to pad, because the layer joins the rows of several ranks.
    """

    _mode: str
    config: TransformerConfig

    @property
    def explicit_expert_comm(self) -> bool:
        return self.parallel_mode is None

    @explicit_expert_comm.setter
    def explicit_expert_comm(self, caller_communicates: bool) -> None:
        self.parallel_mode = None if caller_communicates else self._mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        missing = -x.shape[0] % FP8_MULTIPLE if self.config.fp8 and not self.config.sequence_parallel else 0
        if not missing:
            return super().forward(x)  # type: ignore[no-any-return]
        out, bias = super().forward(F.pad(x, (0, 0, 0, 0, 0, missing)))
        return out[: x.shape[0]], bias


class TENormColumnLinear(_Linear, TELayerNormColumnParallelLinear):
    """Transformer Engine's column-parallel projection, which first normalises its input."""

    _mode = "column"


class TEBiasedNormColumnLinear(BiasedInput, TENormColumnLinear):
    """`TENormColumnLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TEColumnLinear(_Linear, TEColumnParallelLinear):
    """Transformer Engine's column-parallel projection, without a norm."""

    _mode = "column"


class TEBiasedColumnLinear(BiasedInput, TEColumnLinear):
    """`TEColumnLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TERowLinear(_Linear, TERowParallelLinear):
    """Transformer Engine's row-parallel projection."""

    _mode = "row"
    reduction = None  # rounded reductions (`OutputProjection.reduction`) are refused with these layers


class TEBiasedRowLinear(BiasedOutput, TERowLinear):
    """`TERowLinear` that has a bias even if megatron-core's configuration turns biases off."""


class TENormedRowLinear(NormedOutput, TERowLinear):
    """`TERowLinear` whose output is normalised before the residual connection."""


class TEScaledRowLinear(ScaledOutput, TERowLinear):
    """`TERowLinear` whose output is multiplied by a scale before the residual connection."""
