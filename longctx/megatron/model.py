"""A megatron-core `GPTModel` of a given shape, and the two halves of running it: hidden states, logits."""

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from longctx.megatron.attention import ContextParallelAttention, Pass
from longctx.megatron.spd.layer import SPDTransformerLayer, follow_plan
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Positions, Tensor, Tokens
from longctx.spd.plan import SPDPlan

__all__ = ["GPTModel", "build_model", "hidden_states", "layers_in_use", "logits", "padded_vocab_size", "rotary_angles"]


_NEVER = -1e9  # the logit of a token that does not exist: its probability is 0 in any precision


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with megatron-core's signature; unlike its own wrapper it allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # megatron-core's finalize_model_grads sums the gradient over TP ranks by this mark.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


def layers_in_use(asked: str) -> str:
    """``local`` or ``te``: the layers that ``model.layers=asked`` takes on this machine.

    ``auto`` takes Transformer Engine's where it is installed and there is CUDA.  Raises ValueError for ``te``
    without it.
    """
    there = importlib.util.find_spec("transformer_engine_torch") is not None and torch.cuda.is_available()
    if asked == "te" and not there:
        raise ValueError(
            "model.layers=te needs Transformer Engine and CUDA: pip install 'longctx[gpu]', or use model.layers=local"
        )
    return "te" if there and asked != "local" else "local"


def build_model(
    shape: ModelShape,
    groups: Any,
    *,
    dtype: torch.dtype,
    layers: str,
    device: torch.device,
    plan: SPDPlan | None = None,
    **options: Any,
) -> GPTModel:
    """A GPTModel of ``shape``, sharded over ``groups`` (tp, pp), with uninitialised weights (see `weights.load`).

    With a ``plan`` its blocks drop reductions, and `follow_plan` may change which.  ``options`` are further settings
    of megatron-core's TransformerConfig: those of training.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated")  # its own default
        warnings.filterwarnings(
            "ignore", message="If you are using transformer_engine as the transformer implementation"
        )
        config = _config(shape, groups, dtype, options)
    assert layers == "local" or plan is None, "recipes refuse this"
    spec = local_layer(TransformerLayer if plan is None else SPDTransformerLayer) if layers == "local" else _te_layer()
    stages, stage = groups.pp.size(), groups.pp.rank()
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * (shape.layers // stages), layer_norm=RMSNorm),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        vocab_size=padded_vocab_size(shape, groups.tp.size()),
        max_sequence_length=shape.max_positions,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",  # angles come from explicit positions: see `hidden_states`
        pg_collection=groups,
    )
    if plan is not None:
        follow_plan(model, plan)
    return model.to(device).eval()


def padded_vocab_size(shape: ModelShape, tp: int) -> int:
    """The vocabulary, rounded up so that every rank has the same number of rows."""
    return -(-shape.vocab_size // tp) * tp


def hidden_states(
    model: GPTModel, tokens: Tokens, angles: Float[Tensor, "s 1 1 d"], one_pass: Pass
) -> Float[Tensor, "s b hidden"]:
    """Final hidden states of this rank's rows, before the output layer."""
    if not tokens.shape[1]:
        return _without_rows(model, one_pass)
    embedded = model.embedding(tokens, None)
    return model.decoder(embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=one_pass)


def _without_rows(model: GPTModel, one_pass: Pass) -> Float[Tensor, "0 1 hidden"]:
    """A rank without rows has nothing to project (megatron-core cannot, either), but its keys are asked for."""
    config, like = model.config, next(model.parameters())
    assert one_pass.attend
    width = config.kv_channels
    tp = config.tensor_model_parallel_size
    q, k = (like.new_empty(1, 0, n // tp, width) for n in (config.num_attention_heads, config.num_query_groups))
    for layer in range(config.num_layers):
        one_pass.attend(layer, q, k, k)
    return like.new_empty(0, 1, config.hidden_size)


def logits(model: GPTModel, hidden: Float[Tensor, "s b hidden"], tp: Comm, vocab_size: int) -> Float[Tensor, "s b v"]:
    """float32 logits of the ``vocab_size`` (padding dropped), on every rank of ``tp``, the model's own group."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    # megatron-core's own gather allocates on a CUDA device, always.
    part, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=False)
    return torch.cat(tp.all_gather(part, [tuple(part.shape)] * tp.size), -1)[..., :vocab_size].float()


def token_losses(
    model: GPTModel, tokens: Tokens, targets: Tokens, angles: Float[Tensor, "s 1 1 d"], one_pass: Pass, vocab_size: int
) -> Tensor:
    """Cross-entropy [s b] of each row's target (nats, float32); of any but the last pipeline stage, its hidden states.

    The padding of the vocabulary takes no part, so that any tensor-parallel degree has the same loss.
    """
    embedded = model.embedding(tokens, None) if model.pre_process else None
    hidden = model.decoder(embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=one_pass)
    if not model.post_process:
        return hidden
    return losses_of(model, hidden, targets.transpose(0, 1), vocab_size)


def losses_of(model: GPTModel, hidden: Float[Tensor, "s b hidden"], targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy [s b] of ``targets`` [s b], from final hidden states."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    part, _ = model.output_layer(hidden, weight=weight)
    width, tp = part.shape[-1], model.pg_collection.tp
    if padding := max(0, min(width, (tp.rank() + 1) * width - vocab_size)):
        part = torch.cat([part[..., : width - padding], part.new_full((*part.shape[:-1], padding), _NEVER)], -1)
    return vocab_parallel_cross_entropy(part.float(), targets.contiguous())


def rotary_angles(shape: ModelShape, positions: Positions) -> Float[Tensor, "s 1 1 d"]:
    """Angles (radians) of explicit positions, so that any layout and any restart of positions will do."""
    frequencies = torch.tensor(shape.rotary.frequencies, dtype=torch.float32, device=positions.device)
    half = positions.float().unsqueeze(-1) * frequencies
    return torch.cat([half, half], -1)[:, None, None, :]


def _config(shape: ModelShape, groups: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        # Weights are loaded: drawing them would only cost time. perform_initialization=False would also
        # drop the marks that say how a parameter is sharded.
        use_cpu_initialization=True,
        init_method=_keep,
        output_layer_init_method=_keep,
        # Every fusion wants CUDA, Transformer Engine, Apex or a compiler.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **options,
    )


def _keep(_: Tensor) -> None:
    """An initialiser that leaves the weight as it is."""


def local_layer(kind: type[TransformerLayer]) -> ModuleSpec:
    """megatron-core's description of a block of ``kind``, from layers that run anywhere."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ContextParallelAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=kind,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _te_layer() -> ModuleSpec:
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = ContextParallelAttention
    return spec
