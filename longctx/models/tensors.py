"""The tensors of a model: canonical names and sizes."""

from longctx.model_shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model, by canonical name; a tied model has no lm_head.weight."""
    norms = ("weight", "bias") if shape.layer_norm else ("weight",)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden)}
    layer = {**_matrices(shape), **_norms(shape, norms)}
    tensors |= {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}
    tensors |= {f"model.norm.{kind}": (shape.hidden,) for kind in norms}
    return tensors if shape.tied else {**tensors, HEAD: tensors[EMBEDDING]}


def _matrices(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's projections and of their biases."""
    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    projections = {
        "self_attn.q_proj": (q, hidden, shape.qkv_bias),
        "self_attn.k_proj": (kv, hidden, shape.qkv_bias),
        "self_attn.v_proj": (kv, hidden, shape.qkv_bias),
        "self_attn.o_proj": (hidden, q, shape.out_bias),
        "mlp.gate_proj": (shape.ffn, hidden, shape.mlp_bias),
        "mlp.up_proj": (shape.ffn, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, shape.ffn, shape.mlp_bias),
    }
    if not shape.gated:
        del projections["mlp.gate_proj"]
    sizes: dict[str, tuple[int, ...]] = {}
    for module, (rows, columns, has_bias) in projections.items():
        sizes |= {f"{module}.weight": (rows, columns)} | ({f"{module}.bias": (rows,)} if has_bias else {})
    return sizes


def _norms(shape: ModelShape, kinds: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's norms."""
    modules: dict[str, int] = {}
    if shape.norms != "post":
        modules |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), shape.hidden)
    if shape.norms != "pre":
        modules |= dict.fromkeys(("attention_output_layernorm", "mlp_output_layernorm"), shape.hidden)
    sizes = {f"{module}.{kind}": (size,) for module, size in modules.items() for kind in kinds}
    if shape.qk_norm != "none":
        q, k = (shape.heads, shape.kv_heads) if shape.qk_norm == "width" else (1, 1)
        sizes |= {"self_attn.q_norm.weight": (q * shape.head_dim,), "self_attn.k_norm.weight": (k * shape.head_dim,)}
    return {name: tuple(size) for name, size in sizes.items()}
