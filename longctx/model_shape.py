"""The dimensions and options of a decoder, as in config.json.  Imports nothing, so that every package may import it."""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: one frequency, in radians per position, for each pair of rotated channels.

    * Fewer frequencies than half the head dimension: only the first ``2 * len(frequencies)`` channels rotate.
    * ``scale`` multiplies cos and sin (the attention factor of YaRN).
    * ``interleaved``: a pair is two neighbouring channels (2i, 2i + 1).  Otherwise, with n pairs, it is (i, i + n).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The dimensions and options of a decoder of attention and feed-forward blocks.

    * ``ffn``: the hidden size of the feed-forward network.
    * ``max_positions``: the longest sequence that the model was trained for, in tokens.
    * ``tied``: the output head shares the weights of the embedding.
    * ``qkv_bias``, ``out_bias``, ``mlp_bias``: these projections have a bias.
    * ``rotaries``: per layer, the rotary embedding; None for a layer without.  Empty means None for every layer.
    * ``end_tokens``: ids of the tokens that end generation.
    * ``windows``: per layer, the number of keys that a query sees at most, its own included; None for all earlier
      keys.  Empty means None for every layer.
    * ``init_std``: standard deviation of the initial weights in training from scratch.
    * ``norms``: where a block normalises: the inputs of attention and feed-forward network ("pre"), their outputs
      ("post"), or both ("sandwich").
    * ``layer_norm``: norms are LayerNorm with bias, not RMSNorm.  ``zero_centered``: they multiply by 1 + weight.
    * ``qk_norm``: queries and keys are normalised per head ("head"), over all heads together ("width"), or not.
    * ``gated``: the feed-forward network is activation(gate) * up, not activation(up).
    * ``softmax_scale``: factor of the attention scores; None for 1/sqrt(head_dim).
    * ``embedding_scale``: factor of the embedding's output.
    * ``residual_scale``: factor of what attention and feed-forward network add to the residual stream.
    * ``logit_scale``: factor of the logits.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    rotaries: tuple[Rotary | None, ...] = field(default=(), repr=False)
    end_tokens: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    init_std: float = 0.02
    out_bias: bool = False
    mlp_bias: bool = False
    norms: Literal["pre", "post", "sandwich"] = "pre"
    layer_norm: bool = False
    zero_centered: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    softmax_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("windows", "rotaries"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * self.layers)
            assert len(getattr(self, name)) == self.layers, f"{name} needs an entry for each layer"

    def first(self, layers: int) -> "ModelShape":
        """Return the shape of the model's first ``layers`` layers."""
        return replace(self, layers=layers, windows=self.windows[:layers], rotaries=self.rotaries[:layers])

    def refuse_unknown_token(self, largest: int, where: str = "the text") -> None:
        """Raise ValueError if ``largest``, the largest token id of a text, is beyond the vocabulary.

        A tokenizer may know more tokens than the model has rows in its embedding, such as one for padding.
        """
        if largest >= self.vocab_size:
            raise ValueError(
                f"{where} has token {largest:,}, beyond the model's vocabulary of {self.vocab_size:,} (ids from 0): "
                "use the tokenizer that belongs to the model, or take that token's text out"
            )
