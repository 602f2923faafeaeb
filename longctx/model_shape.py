"""The dimensions and options of a decoder, as in config.json.  Imports nothing, so that every package may import it."""

from dataclasses import dataclass, field, replace
from typing import Literal

_BY_LAYER = ("windows", "rotaries", "experts")


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
class Experts:
    """A mixture of experts: ``count`` feed-forward networks; a router chooses ``per_token`` of them for each token.

    * ``ffn``: the hidden size of one expert.
    * ``renormalised``: the softmax that weighs the chosen experts runs over their logits only, so their weights add up
      to 1.  Otherwise it runs over the logits of all experts.
    * ``router_loss``: coefficient, in training, of the loss that balances the experts; 0 for none.
    """

    count: int
    per_token: int
    ffn: int
    renormalised: bool = True
    router_loss: float = 0.0


@dataclass(frozen=True)
class ModelShape:
    """The dimensions and options of a decoder of attention and feed-forward blocks.

    * ``ffn``: the hidden size of the feed-forward network.
    * ``max_positions``: the longest sequence that the model was trained for, in tokens.
    * ``tied``: the output head shares the weights of the embedding.
    * ``qkv_bias``, ``out_bias``, ``mlp_bias``: these projections have a bias; ``mlp_bias`` covers experts and routers.
    * ``rotaries``: per layer, the rotary embedding (None: the layer has none).  Empty means None for every layer.
    * ``end_tokens``: ids of the tokens that end generation.
    * ``windows``: per layer, the largest number of keys that a query sees, including its own; None for all earlier
      keys.  Empty means None for every layer.
    * ``init_std``: standard deviation of the initial weights in training from scratch.
    * ``norms``: a block normalises the inputs of attention and feed-forward network ("pre"), their outputs ("post"), or
      both ("sandwich").
    * ``layer_norm``: norms are LayerNorm with bias, not RMSNorm.  ``zero_centered``: they multiply by 1 + weight.
    * ``qk_norm``: queries and keys are normalised per head ("head"), over all heads together ("width"), or not.
    * ``gated``: the feed-forward network is activation(gate) * up, not activation(up).
    * ``softmax_scale``: scale of the attention scores; None for 1/sqrt(head_dim).
    * ``embedding_scale``: scale of the embedding's output.
    * ``residual_scale``: scale of the outputs of attention and feed-forward network, before the residual connection.
    * ``logit_scale``: scale of the logits.
    * ``sinks``: each head has a learned attention sink, a score that takes weight from all keys (`partial.sink`).
    * ``glu_limit``: bound of gate and up values: up is clamped on both sides, gate from above; None does not clamp.
      ``glu_offset`` is added to the up values.
    * ``experts``: per layer, the experts that replace its feed-forward network of size ``ffn`` (None: the layer has no
      experts).  Empty means None for every layer.  All layers with experts have equal experts.
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
    activation: Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid"] = "silu"
    gated: bool = True
    softmax_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    sinks: bool = False
    glu_limit: float | None = None
    glu_offset: float = 0.0
    experts: tuple[Experts | None, ...] = ()

    def __post_init__(self) -> None:
        for name in _BY_LAYER:
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * self.layers)
            assert len(getattr(self, name)) == self.layers, f"{name} needs an entry for each layer"
        assert len({*self.experts} - {None}) <= 1, "layers with different experts are not implemented"

    @property
    def mixture(self) -> Experts | None:
        """The mixture of experts that some or all layers have; None for a model without experts."""
        return next((experts for experts in self.experts if experts), None)

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The hidden sizes of the model's feed-forward networks and experts, without repetition."""
        return tuple(sorted({experts.ffn if experts else self.ffn for experts in self.experts}))

    @property
    def ffn_weights_per_token(self) -> int:
        """Number of feed-forward weights that multiply one token, over all layers.

        In a layer with experts, these are the weights of the chosen experts and of the router.
        """
        dense = self.experts.count(None) * (2 + self.gated) * self.hidden * self.ffn
        if self.mixture is None:
            return dense
        chosen = self.mixture.per_token * (2 + self.gated) * self.mixture.ffn + self.mixture.count
        return dense + (self.layers - self.experts.count(None)) * self.hidden * chosen

    def cached_row_bytes(self, tp: int, ulysses: int, element_bytes: int) -> int:
        """Return the bytes of a token's keys and values in all layers, on a rank of a mesh of ``tp`` and ``ulysses``.

        Ranks with fewer KV heads than ranks have one head each.
        """
        return 2 * self.layers * max(1, self.kv_heads // tp // ulysses) * self.head_dim * element_bytes

    def first(self, layers: int) -> "ModelShape":
        """Return the shape of the model's first ``layers`` layers."""
        return replace(self, layers=layers, **{name: getattr(self, name)[:layers] for name in _BY_LAYER})

    def refuse_unknown_token(self, largest: int, where: str = "the text") -> None:
        """Raise ValueError if ``largest``, the largest token id of a text, is beyond the vocabulary.

        ``where`` names the text in the message.  A tokenizer may have more tokens than the embedding has rows, such as
        a token for padding.
        """
        if largest >= self.vocab_size:
            raise ValueError(
                f"{where} has token {largest:,}, beyond the model's vocabulary of {self.vocab_size:,} (ids from 0): "
                "use the tokenizer that belongs to the model, or take that token's text out"
            )
