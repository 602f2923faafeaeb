"""The dimensions of a decoder, as in config.json.  Imports nothing, so that every package may import it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: one frequency, in radians per position, for each pair of channels."""

    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions and options of a Llama-architecture decoder.

    * ``ffn``: the hidden size of the SwiGLU feed-forward network.
    * ``max_positions``: the longest sequence that the model was trained for, in tokens.
    * ``tied``: the output head shares the weights of the embedding.
    * ``qkv_bias``: the query, key and value projections have a bias.
    * ``end_tokens``: ids of the tokens that end generation.
    * ``windows``: per layer, the number of keys that a query sees at most, its own included; None for all earlier
      keys.  Empty means None for every layer.
    * ``init_std``: standard deviation of the initial weights in training from scratch.
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
    rotary: Rotary = field(repr=False)
    end_tokens: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        assert len(self.windows) == self.layers, "windows needs an entry (a number or None) for each layer"

    def refuse_unknown_token(self, largest: int, where: str = "the text") -> None:
        """Raise ValueError if ``largest``, the largest token id of a text, is beyond the vocabulary.

        A tokenizer may know more tokens than the model has rows in its embedding, such as one for padding.
        """
        if largest >= self.vocab_size:
            raise ValueError(
                f"{where} has token {largest:,}, beyond the model's vocabulary of {self.vocab_size:,} (ids from 0): "
                "use the tokenizer that belongs to the model, or take that token's text out"
            )
