"""The features in which a model differs from Llama, in words."""

from longctx.model_shape import ModelShape


def features_of(shape: ModelShape) -> list[str]:
    """Return, in words, the features in which a model of ``shape`` differs from Llama.

    Examples: "window on every layer", "attention sinks".
    """
    rotated = {2 * len(rotary.frequencies) for rotary in shape.rotaries if rotary}
    features = {
        "window on every layer": None not in shape.windows,
        "window on some layers": len(set(shape.windows)) > 1,
        "no rotary embedding on some layers": None in shape.rotaries,
        "rotary embedding by type of layer": len({rotary for rotary in shape.rotaries if rotary}) > 1,
        "rotary embedding on a part of each head": any(channels < shape.head_dim for channels in rotated),
        "interleaved rotary pairs": any(rotary.interleaved for rotary in shape.rotaries if rotary),
        "QK-norm per head": shape.qk_norm == "head",
        "QK-norm over all heads": shape.qk_norm == "width",
        "norms before and after": shape.norms == "sandwich",
        "norms after": shape.norms == "post",
        "1 + weight in norms": shape.zero_centered,
        "LayerNorm": shape.layer_norm,
        "bias on q, k, v": shape.qkv_bias,
        "bias on all projections": shape.out_bias and shape.mlp_bias,
        "GELU": shape.activation.startswith("gelu"),
        "no gate in the MLP": not shape.gated,
        "mixture of experts": shape.mixture is not None,
        "mixture of experts on some layers": None in shape.experts and shape.mixture is not None,
        "attention sinks": shape.sinks,
        "clamped gate": shape.glu_limit is not None,
        "scale of attention scores": shape.softmax_scale is not None,
        "scale of the embedding": shape.embedding_scale != 1,
        "scale of residual connections": shape.residual_scale != 1,
        "scale of the logits": shape.logit_scale != 1,
    }
    return [feature for feature, has in features.items() if has]
