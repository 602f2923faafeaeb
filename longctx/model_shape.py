"""The shape of a decoder: what config.json says, as plain numbers; a leaf that any room may read."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: one frequency (radians a position) for each pair of channels."""

    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Llama-architecture decoder; ``max_positions`` is the longest context that it was made for.

    ``windows``: of each layer, how many keys back a query sees, its own included; None where it sees all.
    ``init_std`` is that of weights that are drawn to begin with.
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
        assert len(self.windows) == self.layers, "a window, or None, for each layer"
