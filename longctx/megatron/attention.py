"""Our attention in megatron-core's layers: a change of axes, and nothing that knows ranks or caches."""

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
    """One pass through the model: ``attend(layer, q, k, v) -> out``, all [b s h d], layers counted from 0.

    megatron-core hands `PackedSeqParams` to every layer's attention untouched, also across pipeline stages;
    ``qkv_format`` "sbhd" keeps its own code on the plain path.
    """

    qkv_format: str = "sbhd"
    attend: LayerAttention | None = None


class ContextParallelAttention(MegatronModule):
    """The core attention of a layer spec: hands (q, k, v) of its layer to the `Pass` that it is in."""

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
            raise ValueError("context-parallel attention is self-attention scaled by 1/sqrt(d), without dropout")
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
        assert isinstance(packed_seq_params, Pass) and packed_seq_params.attend, "a model runs inside a Pass"
        assert attention_mask is None and attention_bias is None, "the layout is the mask"
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = packed_seq_params.attend(self.layer, q, k, v)
        return out.transpose(0, 1).reshape(query.shape[0], query.shape[1], -1)
