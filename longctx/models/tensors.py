"""The tensors of a model: canonical names and sizes."""

from longctx.model_shape import Experts, ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Sizes = dict[str, tuple[int, ...]]  # shapes of tensors by name


def tensor_shapes(shape: ModelShape) -> Sizes:
    """Return the shape of each tensor of a model, by canonical name; a tied model has no lm_head.weight."""
    norms = ("weight", "bias") if shape.layer_norm else ("weight",)
    tensors: Sizes = {EMBEDDING: (shape.vocab_size, shape.hidden)}
    for i, experts in enumerate(shape.experts):
        feed_forward = _mixture(shape, experts) if experts else _mlp(shape, shape.ffn, "mlp")
        layer = {**_attention(shape), **feed_forward, **_norms(shape, norms)}
        tensors |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    tensors |= {f"model.norm.{kind}": (shape.hidden,) for kind in norms}
    return tensors if shape.tied else {**tensors, HEAD: tensors[EMBEDDING]}


def _attention(shape: ModelShape) -> Sizes:
    """Return the shapes of a layer's q, k, v and o projections, and of their biases and the sinks, if any."""
    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    return (
        _projection("self_attn.q_proj", q, hidden, shape.qkv_bias)
        | _projection("self_attn.k_proj", kv, hidden, shape.qkv_bias)
        | _projection("self_attn.v_proj", kv, hidden, shape.qkv_bias)
        | _projection("self_attn.o_proj", hidden, q, shape.out_bias)
        | ({"self_attn.sinks": (shape.heads,)} if shape.sinks else {})
    )


def _mlp(shape: ModelShape, ffn: int, module: str) -> Sizes:
    """Return the shapes of the projections of ``module``, a feed-forward network or expert of size ``ffn``."""
    gate = _projection(f"{module}.gate_proj", ffn, shape.hidden, shape.mlp_bias) if shape.gated else {}
    return (
        gate
        | _projection(f"{module}.up_proj", ffn, shape.hidden, shape.mlp_bias)
        | _projection(f"{module}.down_proj", shape.hidden, ffn, shape.mlp_bias)
    )


def _mixture(shape: ModelShape, experts: Experts) -> Sizes:
    """Return the shapes of the weights, and biases if any, of a layer's router and of all its experts."""
    sizes = _projection("mlp.router", experts.count, shape.hidden, shape.mlp_bias)
    for i in range(experts.count):
        sizes |= _mlp(shape, experts.ffn, f"mlp.experts.{i}")
    return sizes


def _projection(module: str, rows: int, columns: int, bias: bool) -> Sizes:
    """Return the shapes of ``module``'s weight, [rows columns], and of its bias, [rows], if it has one."""
    return {f"{module}.weight": (rows, columns)} | ({f"{module}.bias": (rows,)} if bias else {})


def _norms(shape: ModelShape, kinds: tuple[str, ...]) -> Sizes:
    """Return the shapes of a layer's norms: of its inputs and outputs, and of queries and keys, as far as it has them.

    ``kinds`` are the parameters of a norm: "weight", or "weight" and "bias".  Norms of queries and keys have only a
    weight.
    """
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
