"""The core attention of megatron-core's layers, replaced by a call to the attention of the current `Pass`.

The module rotates queries and keys, scales queries and changes the order of axes.  It knows neither ranks nor caches;
the `Pass` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from longctx.megatron.modules import Metadata, Offsets, describe_shard
from longctx.model_shape import ModelShape, Rotary
from longctx.shapes import Float, Positions, Tensor

LayerAttention = Callable[..., Tensor]


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of a rotary embedding at a pass's positions, times the embedding's scale, [s channels].

    With ``interleaved``, channels 2 i and 2 i + 1 are rotated together; otherwise channels i and i + ``channels`` / 2.
    """

    cos: Float[Tensor, "s channels"]
    sin: Float[Tensor, "s channels"]
    interleaved: bool

    def rotate(self, x: Float[Tensor, "s b h d"]) -> Float[Tensor, "s b h d"]:
        """Return ``x`` with its first ``channels`` channels rotated; row i is at the table's position i."""
        cos, sin = (table[:, None, None].to(x.dtype) for table in (self.cos, self.sin))
        channels = cos.shape[-1]
        turned = x[..., :channels]
        if self.interleaved:
            quarter_turn = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
            return torch.cat([turned * cos + quarter_turn * sin, x[..., channels:]], -1)
        # Both halves have the same angles.  Negating or copying a half would cost more passes over memory.
        (first, second), cos, sin = turned.chunk(2, -1), cos[..., : channels // 2], sin[..., : channels // 2]
        halves = (first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)
        return torch.cat([*halves, x[..., channels:]], -1)


def rotary_tables(
    shape: ModelShape, positions: Positions, dtype: torch.dtype = torch.float32
) -> tuple[RotaryTable | None, ...]:
    """Return each layer's table for explicit ``positions``; None for a layer that has no rotary embedding.

    Positions may have any order and restart anywhere.  Tables are float32, or float64 if ``dtype`` is float64.  Layers
    with equal rotary embeddings share a table.
    """
    precise = torch.promote_types(dtype, torch.float32)
    tables = {rotary: _table(rotary, positions, precise) for rotary in set(shape.rotaries)}
    return tuple(tables[rotary] for rotary in shape.rotaries)


def _table(rotary: Rotary | None, positions: Positions, dtype: torch.dtype) -> RotaryTable | None:
    """Return the table of one rotary embedding; None for a layer that has no rotary embedding."""
    if rotary is None:
        return None
    frequencies = torch.tensor(rotary.frequencies, dtype=dtype, device=positions.device)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    angles = angles.repeat_interleave(2, -1) if rotary.interleaved else torch.cat([angles, angles], -1)
    return RotaryTable(angles.cos() * rotary.scale, angles.sin() * rotary.scale, rotary.interleaved)


@dataclass
class Pass(PackedSeqParams):
    """One pass through the model, with the attention function that its layers call.

    ``attend(layer, q, k, v)`` returns the attention output.  ``layer`` counts from 0 over the whole model.  All four
    tensors are [b s h d], with this tensor-parallel rank's heads; q and k are rotated already.  In sharded decoding,
    the output has this rank's share of the heads only.
    Models with attention sinks call ``attend(layer, q, k, v, sinks)``; ``sinks`` [hq] are the query heads' sink scores.
    ``rotary`` has a table for each layer of the whole model (`rotary_tables`); if it is empty, nothing is rotated.

    megatron-core hands a `PackedSeqParams` unchanged to the attention of every layer, on every pipeline stage.
    ``qkv_format`` "sbhd" keeps megatron-core on its code path for unpacked sequences.
    """

    qkv_format: str = "sbhd"
    attend: LayerAttention | None = None
    rotary: Sequence[RotaryTable | None] = ()


class ContextParallelAttention(MegatronModule):
    """Core attention for a layer spec: rotates q and k of its layer, and passes q, k and v to the current `Pass`.

    Kernels scale scores by 1/sqrt(d).  For another ``softmax_scale``, queries are multiplied by ``softmax_scale`` *
    sqrt(d).

    With ``sinks``, the module learns the score of an attention sink for each query head of this tensor-parallel rank.

    Raises ValueError for cross-attention and attention dropout.
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
        sinks: bool = False,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self" or config.attention_dropout:
            raise ValueError(
                f"context-parallel attention does not support attention_type={attention_type}, "
                f"attention_dropout={config.attention_dropout}; use self-attention without dropout"
            )
        self.layer = layer_number - 1
        self.query_scale = 1.0 if softmax_scale is None else softmax_scale * config.kv_channels**0.5
        self.sinks: torch.nn.Parameter | None = None
        if sinks:
            self._tp = pg_collection.tp
            heads = config.num_attention_heads // self._tp.size()
            self.sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            setattr(self.sinks, "tensor_model_parallel", True)  # noqa: B010
            setattr(self.sinks, "partition_dim", 0)  # noqa: B010

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
        if packed_seq_params.rotary and (table := packed_seq_params.rotary[self.layer]):
            query, key = table.rotate(query), table.rotate(key)
        if self.query_scale != 1:
            query = query * self.query_scale
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        sinks = () if self.sinks is None else (self.sinks,)
        out = packed_seq_params.attend(self.layer, q, k, v, *sinks)
        return out.transpose(0, 1).flatten(2)  # in sharded decoding, only this rank's share of the heads

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Metadata = None) -> Any:
        if self.sinks is None:
            return {}
        return describe_shard("sinks", self.sinks, self._tp, prefix, sharded_offsets, metadata)
