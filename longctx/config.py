"""Sections of a run's configuration: frozen dataclasses with their defaults, shown and chosen in configs/."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis, fastest-varying first (arXiv 2405.07719, Tip 7)."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis, ranks in vars(self).items():
            if ranks < 1:
                raise ValueError(f"mesh.{axis}={ranks}: use at least one rank")

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return prod(vars(self).values())

    @property
    def sequence_parallel(self) -> bool:
        """Whether training shards activations between tensor-parallel layers by rows: always, at no extra traffic."""
        return self.tp > 1

    @property
    def context(self) -> int:
        """Number of ranks that share one sequence."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        used = [f"{axis}={ranks}" for axis, ranks in vars(self).items() if ranks > 1]
        return " ".join(used) or "one rank"


@dataclass(frozen=True)
class ModelSource:
    """Source of a model's weights, configuration and tokenizer; one of three.

    ``source`` is a Hugging Face folder or hub name.  ``wheel`` and ``gguf`` are a PyPI requirement and the GGUF file
    inside it, with its SHA-256.  ``config`` (fields of config.json) and ``tokenizer`` make a model without weights, to
    be trained from scratch.

    ``max_positions`` is the longest context, ``rope_theta`` the rotary embedding's base; every position is divided by
    ``rope_factor`` (linear interpolation, arXiv 2306.15595).  None keeps the model's value; with ``rope_factor``,
    ``max_positions`` defaults to the model's maximum times the factor.
    """

    name: str
    source: str | None = None
    wheel: str | None = None
    gguf: str | None = None
    sha256: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: Literal["bytes"] | None = None
    max_positions: int | None = None
    rope_theta: float | None = None
    rope_factor: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["auto", "local", "te"] = "auto"
    cache: str = "~/.cache/longctx"

    def __post_init__(self) -> None:
        sources = (self.source, self.wheel and self.gguf and self.sha256, self.config and self.tokenizer)
        if sum(map(bool, sources)) != 1:
            raise ValueError(
                "a model has either model.source, or model.wheel, model.gguf and model.sha256, "
                "or model.config and model.tokenizer"
            )
        for name in ("max_positions", "rope_theta", "rope_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value}: use more than 0, or null for the model's own")


@dataclass(frozen=True)
class PromptSource:
    """The prompt's text: a file, the text itself, or a topic of CPython's documentation (``all`` for the whole).

    ``tokens`` cuts the text; None refuses a text that is too long.  With ``question``, the text is a document and both
    go through the model's chat template; otherwise the text is the prompt.
    """

    file: str | None = None
    text: str | None = None
    pydoc: str | None = None
    question: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Track:
    """Tracking of a run's figures besides its ``metrics.jsonl``, which is always written."""

    backend: Literal["none", "wandb"] = "none"
    project: str = "longctx"
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    job_type: str | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"track.project={self.project}: use 1 to 128 characters, none of / \\ # ? % :")
        if wrong := [tag for tag in self.tags if not 0 < len(tag) <= 64]:
            raise ValueError(f"track.tags has {wrong[0]!r}: a tag has 1 to 64 characters")

    def of(self, kind: str) -> "Track":
        """Return a copy with ``job_type=kind``, unless one is set."""
        return self if self.job_type else replace(self, job_type=kind)


@dataclass(frozen=True)
class Context:
    """How context-parallel ranks share a sequence, and which tensors they exchange.

    ``strategy`` is that of prefill: a name, or a rule that chooses one for each turn (``auto`` uses the cost model,
    ``alg1``, ``alg5`` and ``empirical`` are those of arXiv 2411.01783).  ``chunk`` is the largest number of tokens in
    one prefill pass; None prefills all at once.
    """

    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "auto", "alg1", "alg5", "empirical"] = "pass_kv"
    decode: Literal["pass_kv", "pass_q", "all_gather_kv", "gather_merge"] = "gather_merge"
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    kernel: Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn"] = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"context.chunk={self.chunk}: prefill at least one token at a time, or null for all")


@dataclass(frozen=True)
class Run:
    """Where ranks run: CPU threads per rank (None: the machine's cores, shared evenly), device, and patience.

    ``timeout_minutes`` is how long a rank waits for a silent one before the run fails.
    """

    threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    timeout_minutes: int = 30

    def __post_init__(self) -> None:
        for name in ("threads", "timeout_minutes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name}={value}: use 1 or more")


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Optim:
    """AdamW with a learning rate that warms up over ``warmup`` steps, then decays to ``min_lr`` by ``decay_steps``.

    ``decay_steps=None`` means the steps of the run.  ``clip`` bounds the gradient's norm (0: no bound).  ``zero1``
    shards the optimizer's state over data- and context-parallel ranks (megatron-core's distributed optimizer).
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
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} and optim.lr={self.lr}: use 0 <= min_lr <= lr")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup={self.warmup}: use 0 steps or more")
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} is not after optim.warmup={self.warmup}: "
                "use a larger optim.decay_steps, or null for the steps of the run"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.clip < 0:
            raise ValueError(
                f"optim.betas={list(self.betas)}, eps={self.eps}, clip={self.clip}: "
                "use betas from 0 to below 1, eps above 0, clip 0 or more"
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; a draw depends on ``seed`` and position, not on the mesh."""

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
class TextSource:
    """Source of documents; ``weight`` is its share of all tokens, relative to the other sources.

    One of three.  ``path``: a file, folder or pattern; a line of .jsonl or a row of .parquet is a document, any other
    file is one document (in a folder, its .txt files); all but parquet may be .gz.  ``name``: a dataset of the Hugging
    Face hub with its ``subset`` and ``revision``, downloaded first or read as a stream (``streaming``).  ``pydoc``: the
    documentation that CPython ships, one topic per document; every tenth topic is ``test``, the others ``train``.
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
            raise ValueError("a source of data has one of path (file, folder or pattern), name (on the hub), pydoc")
        if not 0 < self.weight < inf:
            raise ValueError(f"{self}: weight={self.weight}; use a number above 0, or remove the source")

    def __str__(self) -> str:
        if self.pydoc:
            return f"pydoc:{self.pydoc}"
        return str(self.path or ":".join(filter(None, [self.name, self.subset, self.split])))


@dataclass(frozen=True)
class DataSettings:
    """Text to train or measure on: documents packed into sequences of ``length`` tokens, ``batch`` per step.

    ``epochs=None`` repeats the text without end.  ``shuffle`` is the window, in documents of a source, that is read and
    permuted; 0 keeps the reading order.  ``end_token`` ends every document.  ``last`` drops an incomplete last sequence
    and batch, or pads them with tokens that do not count.  ``on_error`` stops the run at a record without text, or
    skips the record.
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

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty: give at least one source, with a path, a name or pydoc")
        least = {"length": 1, "batch": 1, "epochs": 1, "shuffle": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"data.{name}={given}: use {value} or more")


@dataclass(frozen=True)
class SPD:
    """Blocks that drop their first reduction over tensor-parallel ranks (`longctx.spd`).

    ``drop``: ``saved`` takes those of the model's folder; ``ranked`` the least sensitive ``budget`` (a share of all
    blocks), in the order of the file ``sensitivity`` or of the model's folder.  ``blocks`` lists them, counted from 0.
    """

    drop: Literal["saved", "none", "all", "ranked"] = "saved"
    blocks: tuple[int, ...] | None = None
    budget: float | None = None
    sensitivity: str | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and (self.budget is not None or self.drop != "saved"):
            raise ValueError("spd.blocks lists the blocks that drop: leave out spd.budget and spd=none|all|ranked")
        if self.drop in ("none", "all") and (self.budget is not None or self.sensitivity):
            raise ValueError(f"spd={self.drop} does not take spd.budget or spd.sensitivity: use spd=ranked")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ValueError(f"spd.budget={self.budget}: use a share of the blocks, from 0 to 1")
        if self.sensitivity and self.budget is None:
            raise ValueError(
                "spd.sensitivity gives an order of blocks: set spd.budget, such as 0.5, for the share that drops"
            )


BlockClass = Literal["ISB", "SB", "ESB"]


@dataclass(frozen=True)
class Repair:
    """Block-to-block repair of dropped reductions (arXiv 2502.20727, 4.2); configs/spd_adapt.yaml explains each field.

    ``distil``, ``group`` and ``fit`` name classes of blocks.  Blocks learn from ``sequences`` of ``length`` tokens;
    ``held_out`` more report errors; grouping and fitting use the first ``calibration_sequences``.
    """

    distil: tuple[BlockClass, ...] = ("ISB", "SB", "ESB")
    group: tuple[BlockClass, ...] = ("ISB", "SB", "ESB")
    fit: tuple[BlockClass, ...] = ("ISB", "SB", "ESB")
    grouping: Literal["neurons", "shards", "none"] = "neurons"
    inputs: Literal["teacher", "student"] = "teacher"
    own_norms: bool = False
    sequences: int = 256
    length: int = 256
    held_out: int = 16
    calibration_sequences: int = 128
    epochs: int = 2
    batch: int = 4
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "held_out", "calibration_sequences", "epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"repair.{name}={getattr(self, name)}: use more than 0")
        if self.batch > self.sequences:
            raise ValueError(f"repair.batch={self.batch} of repair.sequences={self.sequences}: use a smaller batch")
        if self.calibration_sequences > self.sequences:
            raise ValueError(
                f"repair.calibration_sequences={self.calibration_sequences} is more than "
                f"repair.sequences={self.sequences}: use at most that many"
            )


@dataclass(frozen=True)
class JointRepair:
    """Joint distillation of repaired blocks: ``steps`` of ``batch`` sequences, saved every ``save_every`` steps."""

    steps: int = 64
    batch: int = 8
    lr: float = 1e-4
    save_every: int = 16

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"joint.steps={self.steps}: use 0 for none, or more")
        for name in ("batch", "lr", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"joint.{name}={getattr(self, name)}: use more than 0")
