"""The sizes of a model's tensors, by canonical name."""

from longctx.model_shape import ModelShape


def size_of(shape: ModelShape, name: str) -> tuple[int, ...]:
    """Return the size of the canonical Hugging Face tensor ``name`` of a model of ``shape``."""
    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    over_heads = shape.qk_norm == "width"
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "q_norm": (q if over_heads else shape.head_dim,),
        "k_norm": (kv if over_heads else shape.head_dim,),
        "gate_proj": (shape.ffn, hidden),
        "up_proj": (shape.ffn, hidden),
        "down_proj": (hidden, shape.ffn),
    }
    size = sizes.get(name.split(".")[-2], (hidden,))  # all other modules are norms of the residual stream
    return size[:1] if name.endswith(".bias") else size
