"""The values that a run is made of: frozen dataclasses, filled from configs/; a leaf that anyone may read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, ClassVar, Literal


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
    def sequence_parallel(self) -> bool:
        """In training, tensor-parallel ranks share by rows what lies between their matrices: it costs nothing."""
        return self.tp > 1

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
        ways = (self.source, self.wheel and self.gguf and self.sha256, self.config and self.tokenizer)
        if sum(map(bool, ways)) != 1:
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
class Track:
    """Where a run's figures go besides its ``metrics.jsonl``, which is always written, and what it is called there."""

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
        """This, of a job of that kind unless it says one."""
        return self if self.job_type else replace(self, job_type=kind)


@dataclass(frozen=True)
class Context:
    """How the sequence is shared between ranks, and what travels.

    ``strategy`` is the prefill's: by name, or chosen for each turn by a rule (`longctx.cost`): ``auto`` is the
    cost model's, the others those of arXiv 2411.01783.  ``chunk`` tokens are prefilled at a time.
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
    """AdamW, warmed up over ``warmup`` steps, then decayed to ``min_lr`` over ``decay_steps`` (the run's, if null).

    ``clip`` bounds the gradient's norm (0: not); ``zero1`` shards the optimizer's state over data-parallel and
    context-parallel ranks (megatron-core's distributed optimizer).
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
                f"optim.decay_steps={self.decay_steps} and optim.warmup={self.warmup}: it falls after the warm-up; "
                "use more of the first, or null for the steps of the run"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.clip < 0:
            raise ValueError(
                f"optim.betas={list(self.betas)}, eps={self.eps}, clip={self.clip}: "
                "use betas from 0 to below 1, eps above 0, clip 0 or more"
            )


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
class TextSource:
    """Where documents come from, and their share of all tokens (``weight``, relative to the other sources').

    Either ``path``, a file, a folder or a pattern of files: a document a line of .jsonl or a row of .parquet, any
    other file is one document (a folder's .txt files; .gz of each but parquet).  Or ``name``, a dataset of the
    Hugging Face hub: its ``subset`` and ``revision``, fetched whole first or, ``streaming``, as it is read.
    Local files are always read as a stream.  Or ``pydoc``, the documentation that every CPython carries, a topic a
    document: every tenth topic is ``test``, the others ``train``.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # an item of a list, where another name would go unseen

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
            raise ValueError("a source of data has one of path (file, folder or pattern), name (of the hub), pydoc")
        if not 0 < self.weight < inf:
            raise ValueError(f"{self}: weight={self.weight}; give a number above 0, or leave the source out")

    def __str__(self) -> str:
        if self.pydoc:
            return f"pydoc:{self.pydoc}"
        return str(self.path or ":".join(filter(None, [self.name, self.subset, self.split])))


@dataclass(frozen=True)
class DataSettings:
    """What a model is trained or measured on: documents, packed into sequences of ``length``, ``batch`` at a time.

    ``epochs`` null repeats for ever.  ``shuffle`` is how many documents of a source are held and given in random
    order, those of the next window after them; 0 is reading order.  ``end_token`` closes every document.
    ``last`` is what becomes of an incomplete last sequence and batch, where epochs end: dropped, or filled up with
    tokens that do not count.  ``on_error`` is what becomes of a record that is no text: the run's end, or the record's.
    """

    sources: tuple[TextSource, ...]
    length: int
    batch: int = 1
    epochs: int | None = None
    shuffle: int = 0
    seed: int = 0
    end_token: bool = True
    last: Literal["drop", "pad"] = "drop"
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty: give it at least one source, with a path or a name")
        least = {"length": 1, "batch": 1, "epochs": 1, "shuffle": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"data.{name}={given}: use {value} or more")


@dataclass(frozen=True)
class SPD:
    """Which blocks drop their first reduction over tensor-parallel ranks (`longctx.spd`).

    ``saved``, those that the model's folder says; ``ranked``, of the order in ``sensitivity``, else of that folder,
    the first ``budget`` (a share of all); or ``blocks``, counted from 0.
    """

    drop: Literal["saved", "none", "all", "ranked"] = "saved"
    blocks: tuple[int, ...] | None = None
    budget: float | None = None
    sensitivity: str | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and (self.budget is not None or self.drop != "saved"):
            raise ValueError("spd.blocks says which blocks drop: leave spd.budget and spd=none|all|ranked out")
        if self.drop in ("none", "all") and (self.budget is not None or self.sensitivity):
            raise ValueError(f"spd={self.drop} has no use for spd.budget or spd.sensitivity: use spd=ranked")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ValueError(f"spd.budget={self.budget}: use a share of the blocks, from 0 to 1")
        if self.sensitivity and self.budget is None:
            raise ValueError("spd.sensitivity is an order of blocks: say with spd.budget how many drop, such as 0.5")


BlockClass = Literal["ISB", "SB", "ESB"]


@dataclass(frozen=True)
class Repair:
    """How blocks learn to do without a reduction (arXiv 2502.20727, 4.2); configs/spd_adapt.yaml explains each field.

    ``distil``, ``group`` and ``fit`` name classes of blocks; ``sequences`` of ``length`` tokens are learned from,
    ``held_out`` more report errors, and grouping and fitting look at the first ``calibration_sequences``.
    """

    distil: tuple[BlockClass, ...]
    group: tuple[BlockClass, ...]
    fit: tuple[BlockClass, ...]
    grouping: Literal["neurons", "shards", "none"]
    inputs: Literal["teacher", "student"]
    own_norms: bool
    sequences: int
    length: int
    held_out: int
    calibration_sequences: int
    epochs: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "held_out", "calibration_sequences", "epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"repair.{name}={getattr(self, name)}: use more than 0")
        if self.batch > self.sequences:
            raise ValueError(f"repair.batch={self.batch} of repair.sequences={self.sequences}: take fewer a step")
        if self.calibration_sequences > self.sequences:
            raise ValueError(
                f"repair.calibration_sequences={self.calibration_sequences} is more than "
                f"repair.sequences={self.sequences}: use at most that many"
            )


@dataclass(frozen=True)
class JointRepair:
    """How repaired blocks then learn together: ``steps`` of ``batch`` sequences; the state is saved every so many."""

    steps: int
    batch: int
    lr: float
    save_every: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"joint.steps={self.steps}: use 0 for none, or more")
        for name in ("batch", "lr", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"joint.{name}={getattr(self, name)}: use more than 0")
