"""The core attention of megatron-core's layers, replaced by a call to the attention of the current `Pass`.

The module changes the order of axes only.  It knows neither ranks nor caches; the `Pass` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from longctx.shapes import Float, Tensor

LayerAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Pass(PackedSeqParams):
    """One pass through the model, with the attention function that its layers call.

    ``attend(layer, q, k, v)`` returns the attention output.  All four tensors are [b s h d]; layers count from 0.

    megatron-core hands a `PackedSeqParams` unchanged to the attention of every layer, on every pipeline stage.
    ``qkv_format`` "sbhd" keeps megatron-core on its code path for unpacked sequences.
    """

    qkv_format: str = "sbhd"
    attend: LayerAttention | None = None


class ContextParallelAttention(MegatronModule):
    """Core attention for a layer spec: passes q, k and v of its layer to the current `Pass`.

    Raises ValueError for cross-attention, a softmax scale other than 1/sqrt(d), or attention dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if softmax_scale is not None or attention_type != "self" or config.attention_dropout:
            raise ValueError(
                f"context-parallel attention does not support attention_type={attention_type}, "
                f"softmax_scale={softmax_scale}, attention_dropout={config.attention_dropout}; "
                "use self-attention scaled by 1/sqrt(d), without dropout"
            )
        self.layer = layer_number - 1

    def forward(
        self,
        query: Float[Tensor, "s b hq d"],
        key: Float[Tensor, "s b hk d"],
        value: Float[Tensor, "s b hk d"],
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: Pass | None = None,
    ) -> Float[Tensor, "s b hidden"]:
        assert isinstance(packed_seq_params, Pass) and packed_seq_params.attend, "the model runs with a Pass"
        assert attention_mask is None and attention_bias is None, "the layout determines the mask"
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = packed_seq_params.attend(self.layer, q, k, v)
        return out.transpose(0, 1).reshape(query.shape[0], query.shape[1], -1)
