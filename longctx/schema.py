"""The values that a run is made of: frozen dataclasses, filled from configs/; a leaf that anyone may read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis; fastest-varying first, as arXiv 2405.07719, Tip 7 orders them by bandwidth."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis, ranks in vars(self).items():
            if ranks < 1:
                raise ValueError(f"mesh.{axis}={ranks}: an axis has at least one rank")

    @property
    def ranks(self) -> int:
        return prod(vars(self).values())

    @property
    def context(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        used = [f"{axis}={ranks}" for axis, ranks in vars(self).items() if ranks > 1]
        return " ".join(used) or "one rank"


@dataclass(frozen=True)
class ModelSource:
    """Where weights and tokenizer come from.

    ``source``, a Hugging Face folder or hub name; or ``wheel`` and ``gguf``, a PyPI requirement and the GGUF file
    inside it, whose SHA-256 is ``sha256``; or ``config`` and ``tokenizer``, a model without weights that is
    described in the words of Hugging Face's config.json, to be trained from scratch.
    """

    name: str
    source: str | None = None
    wheel: str | None = None
    gguf: str | None = None
    sha256: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: Literal["bytes"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["auto", "local", "te"] = "auto"
    cache: str = "~/.cache/longctx"

    def __post_init__(self) -> None:
        ways = (self.source, self.wheel and self.gguf and self.sha256, self.config and self.tokenizer)
        if sum(map(bool, ways)) != 1:
            raise ValueError(
                "a model has either model.source, or model.wheel, model.gguf and model.sha256, "
                "or model.config and model.tokenizer"
            )


@dataclass(frozen=True)
class PromptSource:
    """The prompt: a file, a text, or a topic of the documentation that CPython ships (``all`` for the whole).

    It is cut only if ``tokens`` says so.

    With ``question`` the text is a document, and both go through the model's chat template; without, the
    text is the prompt as it stands.
    """

    file: str | None = None
    text: str | None = None
    pydoc: str | None = None
    question: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Context:
    """How the sequence is shared between ranks, and what travels.

    ``strategy`` is the prefill's: by name, or chosen for each turn by a rule (`longctx.cost`): ``auto`` is the
    cost model's, the others those of arXiv 2411.01783.  ``chunk`` tokens are prefilled at a time.
    """

    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "auto", "alg1", "alg5", "empirical"] = "pass_kv"
    decode: Literal["pass_kv", "pass_q", "all_gather_kv", "one_exchange"] = "one_exchange"
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    kernel: Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn"] = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"context.chunk={self.chunk}: prefill at least one token at a time, or null for all")


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy.  The draw depends on ``seed`` and the token's position, not on the mesh."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature}: use 0 for greedy, or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sampling.seed={self.seed}: use 0 to {2**32 - 1}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: use a share above 0, up to 1")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: one frequency (radians a position) for each pair of channels."""

    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Llama-architecture decoder; ``positions`` is the longest context that it was made for.

    ``windows``: of each layer, how many keys back a query sees, its own included; None where it sees all.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocabulary: int
    positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    rotary: Rotary = field(repr=False)
    end_tokens: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        assert len(self.windows) == self.layers, "a window, or None, for each layer"
