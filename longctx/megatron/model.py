"""Build a megatron-core `GPTModel` from a `ModelShape`; run its decoder (hidden states) and output layer (logits)."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from longctx.megatron.attention import Pass
from longctx.megatron.experts import mixture_config
from longctx.megatron.products import speed_up, train_by_onednn
from longctx.megatron.sharded import WeightShare
from longctx.megatron.spd.layer import SPDTransformerLayer, follow_plan
from longctx.megatron.spec import LOCAL, layer_spec, norm_of, record_sharding, te_linears
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.parallel.validate import refuse_no_te, refuse_other_than_te
from longctx.shapes import Float, Tensor, Tokens
from longctx.spd.plan import SPDPlan

__all__ = ["GPTModel", "build_model", "hidden_states", "layers_in_use", "logits", "padded_vocab_size"]


_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
}
# Setting model.fp8 -> fields of TransformerConfig.  The formats are the defaults of Transformer Engine's recipes.
_FP8: dict[str | None, dict[str, Any]] = {
    None: {},
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "block": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
_LOGITS_IN_MEMORY = 50_000_000 // 4


def layers_in_use(requested: str, shape: ModelShape) -> str:
    """Return ``local`` or ``te``: the layers that ``model.layers=requested`` selects on this machine for ``shape``.

    ``auto`` selects ``te`` (Transformer Engine) if it is installed, CUDA is available, and its layers can express the
    model; otherwise ``local``.

    Raises ValueError for ``te`` if Transformer Engine or CUDA is missing, or for a model that it cannot express.
    """
    if requested == "te":
        refuse_no_te("cuda" if torch.cuda.is_available() else "cpu")
        refuse_other_than_te(shape)
        return "te"
    return "te" if requested == "auto" and HAVE_TE and torch.cuda.is_available() and not shape.mixture else "local"


def build_model(
    shape: ModelShape,
    groups: ProcessGroupCollection,
    *,
    dtype: torch.dtype,
    layers: str,
    device: torch.device,
    plan: SPDPlan | None = None,
    mlp_rows: int | None = None,
    fp8: str | None = None,
    **options: Any,
) -> GPTModel:
    """Return a GPTModel of ``shape`` with uninitialised weights, in eval mode; `hf_io.load.load` fills it.

    ``layers`` is "local", or "te" for Transformer Engine's linear layers, which must be installed.  Weights are sharded
    over ``groups.tp``, layers over ``groups.pp``, experts over ``groups.ep``.  With a ``plan`` every layer is an
    `SPDTransformerLayer` and the plan's blocks drop a reduction; `follow_plan` can later apply another.  With
    ``mlp_rows``, MLPs compute that many rows at a time (`TiledMLP`).  ``fp8`` rounds the inputs of Transformer Engine's
    linear layers (`ModelSource.fp8`).  ``options`` are further fields of megatron-core's TransformerConfig, for
    training.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated")  # megatron-core sets it by default
        warnings.filterwarnings(
            "ignore", message="If you are using transformer_engine as the transformer implementation"
        )
        config = _config(shape, groups, dtype, _FP8[fp8] | options)
    assert fp8 is None or layers == "te", "only Transformer Engine's layers round to 8 bits"
    assert layers == "local" or plan is None or plan.tp == groups.tp.size(), "sharded decoding needs local layers"
    layer_class = TransformerLayer if plan is None else SPDTransformerLayer
    stages, stage = groups.pp.size(), groups.pp.rank()
    per_stage = shape.layers // stages
    linears = te_linears(shape) if layers == "te" else LOCAL
    specs = [
        layer_spec(layer_class, shape, groups, experts, mlp_rows, linears)
        for experts in shape.experts[stage * per_stage : (stage + 1) * per_stage]
    ]
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_of(shape)),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        vocab_size=padded_vocab_size(shape, groups.tp.size()),
        max_sequence_length=shape.max_positions,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",  # a `Pass` has rotary tables of explicit positions
        pg_collection=groups,
    )
    record_sharding(model)
    if device.type == "cpu":
        train_by_onednn()
    if model.post_process:
        speed_up(model.output_layer)
    # If this is set, megatron-core builds norms of queries and keys, and sums their gradients over ranks.  That would
    # be wrong for a norm over all heads, of whose weights each rank holds only a part.
    config.qk_layernorm = shape.qk_norm == "head"
    _scale_embedding_and_logits(model, shape, dtype)
    if plan is not None:
        follow_plan(model, plan)
    return model.to(device).eval()


def _scale_embedding_and_logits(model: GPTModel, shape: ModelShape, dtype: torch.dtype) -> None:
    """Make ``model`` multiply its embedding's output and its logits by the scales of ``shape``, by forward hooks."""
    if shape.embedding_scale != 1 and model.pre_process:
        scale = float(torch.tensor(shape.embedding_scale, dtype=dtype))  # rounded, as transformers does
        model.embedding.register_forward_hook(lambda _module, _inputs, out: out * scale)
    if shape.logit_scale != 1 and model.post_process:
        model.output_layer.register_forward_hook(lambda _module, _inputs, out: (out[0] * shape.logit_scale, out[1]))


def padded_vocab_size(shape: ModelShape, tp: int) -> int:
    """Return the vocabulary size rounded up to a multiple of ``tp``, so that every rank holds equally many rows."""
    return -(-shape.vocab_size // tp) * tp


def hidden_states(model: GPTModel, tokens: Tokens, attention_pass: Pass) -> Float[Tensor, "s b hidden"]:
    """Run the whole model over this rank's ``tokens``; return their hidden states after the final norm, for `logits`.

    Without tokens, the rank still calls ``attend`` in every layer, with zero rows, because other ranks need it.
    """
    if not tokens.shape[1]:
        return _run_without_rows(model, attention_pass)
    embedded = model.embedding(tokens, None)
    hidden: Tensor = model.decoder(embedded, attention_mask=None, packed_seq_params=attention_pass)
    return hidden


def _run_without_rows(model: GPTModel, attention_pass: Pass) -> Float[Tensor, "0 1 hidden"]:
    """Call every layer's attention with zero rows, on a rank that holds none of the new tokens.

    Other ranks attend to the keys that this rank caches, so it takes part in their collectives.  It skips the
    projections, because megatron-core's linear layers cannot take zero rows.
    """
    assert attention_pass.attend
    weight: Tensor = next(model.parameters())
    config = model.config
    tp, head_dim = config.tensor_model_parallel_size, config.kv_channels
    q, k = (
        weight.new_empty(1, 0, heads // tp, head_dim) for heads in (config.num_attention_heads, config.num_query_groups)
    )
    for number, layer in enumerate(model.decoder.layers):
        # Under Ulysses, this rank computes its heads' attention for other ranks' rows, with its heads' sinks.
        sinks = layer.self_attention.core_attention.sinks
        attention_pass.attend(number, q, k, k, *(() if sinks is None else (sinks.to(weight.device),)))
    return weight.new_empty(0, 1, config.hidden_size)


def rows_of_logits(vocab_size: int) -> int:
    """Return how many rows of logits may be in memory at once: as many as take 50 MB in float32, at least one."""
    return max(1, _LOGITS_IN_MEMORY // vocab_size)


def logits(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], tp: Comm, vocab_size: int, share: WeightShare | None = None
) -> Float[Tensor, "s b v"]:
    """Return the logits of all ``vocab_size`` tokens, without padding, on every rank of ``tp``.

    ``tp`` is the model's tensor-parallel group.  Logits are float32, or float64 for a model in float64.  With a
    ``share`` (sharded decoding), all context ranks must call this with the same rows.
    """
    weight = tied_weight(model)
    if share:
        shard = share.project_vocab(hidden, model.output_layer.weight if weight is None else weight)
    else:
        # megatron-core's gather always allocates on a CUDA device, so a `Comm` gathers the shards.
        shard, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=False)
    whole = torch.cat(tp.all_gather(shard, [tuple(shard.shape)] * tp.size), -1)[..., :vocab_size]
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def run_stage(model: GPTModel, tokens: Tokens, attention_pass: Pass) -> Float[Tensor, "rows b hidden"]:
    """Return the hidden states after this pipeline stage's layers; the last stage applies the final norm.

    ``rows`` is s / tp under sequence parallelism, otherwise s.  Stages after the first ignore ``tokens``: megatron-core
    has set their input.
    """
    embedded = model.embedding(tokens, None) if model.pre_process else None
    hidden: Tensor = model.decoder(embedded, attention_mask=None, packed_seq_params=attention_pass)
    return hidden


def tied_weight(model: GPTModel) -> Float[Tensor, "vocab hidden"] | None:
    """Return the embedding's weight if the output layer shares it; None lets the output layer use its own."""
    return model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None


def _config(
    shape: ModelShape, groups: ProcessGroupCollection, dtype: torch.dtype, options: Mapping[str, Any]
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        normalization="LayerNorm" if shape.layer_norm else "RMSNorm",
        layernorm_zero_centered_gamma=shape.zero_centered,
        qk_layernorm=shape.qk_norm != "none",
        softmax_scale=shape.softmax_scale,
        gated_linear_unit=shape.gated,
        activation_func=_ACTIVATIONS[shape.activation],
        activation_func_clamp_value=shape.glu_limit,
        glu_linear_offset=shape.glu_offset,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        use_cpu_initialization=True,
        perform_initialization=False,  # loading overwrites all weights
        # Every fusion needs CUDA, Transformer Engine, Apex or a compiler.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **mixture_config(shape, groups.ep.size()),
        **options,
    )
