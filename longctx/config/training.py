"""Text to train on, and the optimizer."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, get_args


@dataclass(frozen=True)
class TextSource:
    """Source of documents; ``weight`` is its share of all tokens, relative to the other sources.

    Exactly one of three is set.

    * ``path``: a file, folder or pattern.  A line of .jsonl or a row of .parquet is a document; any other file, such as
      .txt, is one document.  In a folder, only files of these three kinds are read.  All files but parquet may be .gz.
    * ``name``: a dataset of the Hugging Face hub with its ``subset``, ``split`` and ``revision``, downloaded first or
      read as a stream (``streaming``).
    * ``pydoc``: the documentation that CPython ships, one topic per document; every tenth topic is ``test``, the others
      ``train``.

    ``text_key`` is the field or column of the text, in .jsonl, .parquet and datasets.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # in a list, Hydra does not check names

    path: str | None = None
    pydoc: Literal["train", "test"] | None = None
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text_key: str = "text"
    streaming: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        if sum(map(bool, (self.path, self.name, self.pydoc))) != 1:
            raise ValueError(
                "a data source has exactly one of path (file, folder or pattern), name (on the hub), pydoc: "
                "set one of them, and leave out the others"
            )
        if not self.name and (self.subset or self.revision or self.streaming or self.split != "train"):
            raise ValueError(
                f"{self}: subset, revision, split and streaming apply to a dataset on the hub only: leave them out"
            )
        if self.pydoc and self.text_key != "text":
            raise ValueError(f"{self}: text_key={self.text_key} is not used by pydoc: leave it out")
        if not 0 < self.weight < inf:
            raise ValueError(f"{self}: weight={self.weight}; use a finite number above 0, or remove the source")

    def __str__(self) -> str:
        if self.pydoc:
            return f"pydoc:{self.pydoc}"
        return str(self.path or ":".join(filter(None, [self.name, self.subset, self.split])))


@dataclass(frozen=True)
class DataSettings:
    """Text to train or measure on: documents packed into sequences of ``length`` tokens, ``batch`` per step.

    ``batch`` counts the sequences of all data-parallel ranks.  ``epochs=None`` repeats the text without end.  Each
    source is read and shuffled in windows of ``shuffle`` documents; 0 keeps the reading order.  ``end_token`` ends
    every document.  ``last`` drops an incomplete last sequence and batch, or pads them with tokens that do not count.
    ``on_error`` stops the run at a faulty record, or skips the record; a record with an empty text is always skipped.

    With ``conversations``, each line of .jsonl is a conversation, and only the answers count in the loss.  ``whole``
    never cuts a conversation: a sequence ends with padding if the next conversation does not fit.  A conversation that
    is longer than a sequence is a faulty record.  ``split`` packs without padding and cuts conversations at the ends of
    sequences, like any document.
    """

    sources: tuple[TextSource, ...]
    length: int = 1024
    batch: int = 4
    epochs: int | None = None
    shuffle: int = 0
    seed: int = 0
    end_token: bool = True
    last: Literal["drop", "pad"] = "drop"
    on_error: Literal["stop", "skip"] = "stop"
    conversations: Literal["whole", "split"] | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "data.sources is empty: give at least one source, with a path (file, folder or pattern), a name (of a "
                "dataset on the Hugging Face hub) or pydoc, such as data.sources=[{path:books/}]"
            )
        least = {"length": 1, "batch": 1, "epochs": 1, "shuffle": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"data.{name}={given}: use {value} or more")
        if self.conversations and self.end_token:
            raise ValueError("data.end_token=true: the chat template ends a conversation; use false")
        if self.conversations and (keyed := [source for source in self.sources if source.text_key != "text"]):
            raise ValueError(f"{keyed[0]}: text_key={keyed[0].text_key} is not used by conversations: leave it out")


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Optim:
    """AdamW with a learning rate that warms up over ``warmup`` steps, then decays to ``min_lr`` by ``decay_steps``.

    With ``decay="constant"``, the rate stays at ``lr`` after the warm-up, and ``min_lr`` is not used.  ``decay_steps``
    includes the warm-up; None means the number of steps of the run.  ``clip`` bounds the gradient's norm (0: no bound).
    ``zero1`` shards the optimizer's state over data- and context-parallel ranks (megatron-core's distributed
    optimizer).
    """

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 10
    decay_steps: int | None = None
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    zero1: bool = False

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"optim.lr={self.lr}: use 0 or more")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} and optim.lr={self.lr}: use 0 <= min_lr <= lr")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: use 0 or more")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup={self.warmup}: use 0 steps or more")
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} is not after optim.warmup={self.warmup}: "
                "use a larger optim.decay_steps, or null for the steps of the run"
            )
        if self.decay == "constant" and self.decay_steps is not None:
            raise ValueError(f"optim.decay_steps={self.decay_steps} is not used by optim.decay=constant: leave it out")
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.clip < 0:
            raise ValueError(
                f"optim.betas={list(self.betas)}, eps={self.eps}, clip={self.clip}: "
                "use betas from 0 to below 1, eps above 0, clip 0 or more"
            )

    @property
    def final_lr(self) -> float:
        """Learning rate after the decay: ``lr`` if it is constant."""
        return self.lr if self.decay == "constant" else self.min_lr


Adapted = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of ``rank``, trained instead of the weights (None: train all weights; arXiv 2106.09685).

    The layers ``targets`` (megatron-core's names) get adapters, whose output is multiplied by ``alpha`` / ``rank``.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: tuple[Adapted, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: use 1 or more, or null to train all weights")
        if not 0 < self.alpha < inf:
            raise ValueError(f"lora.alpha={self.alpha}: use a number above 0")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets={list(self.targets)}: name at least one of {', '.join(get_args(Adapted))}, and each once"
            )
        if self.rank is None and (self.alpha, self.targets) != (LoRA.alpha, LoRA.targets):
            raise ValueError(
                "lora.alpha and lora.targets need lora.rank: set it, such as lora.rank=8, or leave them out"
            )
