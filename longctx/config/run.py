"""Sections of how a run computes: mesh, context parallelism, ranks, sampling, tracking."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

_YEAR = 366 * 24 * 60  # minutes
# Setting of sampling -> least and largest value, and advice.
SAMPLING_RANGES: dict[str, tuple[float, float, str]] = {
    "top_k": (0, 2**31 - 1, "; 0 keeps all tokens"),
    "min_p": (0, 1, ", a share of the largest probability"),
    "repetition_penalty": (0.01, 100, "; 1 is none"),
    "presence_penalty": (-2, 2, "; 0 is none"),
    "frequency_penalty": (-2, 2, "; 0 is none"),
    "logprobs": (0, 20, " of the most likely tokens, or null"),
    "seed": (0, 2**32 - 1, ""),
}


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis, fastest-varying first (arXiv 2405.07719, Tip 7).

    ``ep`` adds no ranks.  It divides the ulysses x ring x dp ranks into groups of ``ep`` consecutive ranks.  The ranks
    of a group divide the experts of every layer among them.
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis, ranks in vars(self).items():
            if ranks < 1:
                raise ValueError(f"mesh.{axis}={ranks}: use at least one rank")
        if (shared := self.context * self.dp) % self.ep:
            fit = [n for n in range(1, shared + 1) if shared % n == 0]
            nearest = min(fit, key=lambda n: (abs(n - self.ep), n))
            raise ValueError(
                f"mesh.ep={self.ep} does not divide mesh.ulysses x mesh.ring x mesh.dp = {shared}, the ranks that "
                f"it groups: use mesh.ep={nearest}, or more of those ranks"
            )

    @property
    def ranks(self) -> int:
        """Number of ranks in all; ``ep`` adds none."""
        return prod(ranks for axis, ranks in vars(self).items() if axis != "ep")

    @property
    def sequence_parallel(self) -> bool:
        """True if training uses sequence parallelism: whenever tp > 1, since it sends no more bytes."""
        return self.tp > 1

    @property
    def context(self) -> int:
        """Number of ranks that share one sequence."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        used = [f"{axis}={ranks}" for axis, ranks in vars(self).items() if ranks > 1]
        return " ".join(used) or "one rank"


KernelName = Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn", "triton"]


@dataclass(frozen=True)
class Context:
    """How context-parallel ranks share a sequence, and which tensors they exchange.

    ``strategy`` is the strategy of prefill, or a rule that chooses one for each pass.  The rule ``auto`` uses the cost
    model; ``alg1``, ``alg5`` and ``empirical`` are the rules of arXiv 2411.01783.

    ``decode`` is the strategy of decoding.  With ``sharded``, each context rank multiplies its share of the weights.
    With ``decode=auto``, the cost model chooses ``sharded`` or ``gather_merge``.

    ``layout`` says which positions each rank has, ``kernel`` which implementation computes attention.  ``chunk`` is the
    largest number of tokens in one prefill pass; None prefills all at once.  ``check_schedule`` proves before each pass
    that the messages of attention match on all ranks and cannot deadlock.
    """

    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "auto", "alg1", "alg5", "empirical"] = "pass_kv"
    decode: Literal["pass_kv", "pass_q", "all_gather_kv", "gather_merge", "sharded", "auto"] = "gather_merge"
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    kernel: KernelName = "auto"
    chunk: int | None = None
    check_schedule: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"context.chunk={self.chunk}: use 1 token or more, or null to prefill all tokens at once")


ReduceDtype = Literal["float32", "bfloat16", "int8", "int6"]


@dataclass(frozen=True)
class Reduce:
    """Dtype of the messages that sum the outputs of attention and MLP over tensor-parallel ranks, in inference.

    ``float32`` is the exact all-reduce, in the dtype of the model.  Other dtypes are rounded
    (`longctx.parallel.quantised`).  In int8 and int6, ``group`` values share a scale.  A block that drops its first
    reduction uses ``mlp`` for the remaining one.
    """

    attention: ReduceDtype = "float32"
    mlp: ReduceDtype = "float32"
    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 4 or self.group % 4:
            raise ValueError(f"reduce.group={self.group}: use a multiple of 4, such as 64")
        if self.group != Reduce.group and not {"int8", "int6"} & {self.attention, self.mlp}:
            raise ValueError(f"reduce.group={self.group} is used by int8 and int6 only: use reduce=int8 or reduce=int6")

    @property
    def exact(self) -> bool:
        """True if no message is rounded."""
        return self.attention == self.mlp == "float32"

    @property
    def name(self) -> str:
        """The dtype of both reductions' messages, or ``str(self)`` if they differ or have another size of groups."""
        plain = self.attention == self.mlp and self.group == Reduce.group
        return self.attention if plain else str(self)

    def __str__(self) -> str:
        group = f", groups of {self.group}" if {"int8", "int6"} & {self.attention, self.mlp} else ""
        return f"attention {self.attention}, mlp {self.mlp}{group}"


@dataclass(frozen=True)
class Run:
    """Threads, device and timeout of the ranks.

    ``threads`` are CPU threads per rank (None: an even share of the machine's cores).  ``timeout_minutes`` is how long
    a rank waits for another rank's answer before the run fails.
    """

    threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    timeout_minutes: int = 30

    def __post_init__(self) -> None:
        for name in ("threads", "timeout_minutes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name}={value}: use 1 or more")
        if self.timeout_minutes > _YEAR:
            raise ValueError(f"run.timeout_minutes={self.timeout_minutes}: use at most {_YEAR:,}, a year")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and which of them end an answer.

    ``temperature`` 0 is greedy.  Sequence i draws each token from ``seed + i`` and the position of the token before it,
    so its draws are the same on any mesh and in any batch.  ``top_k`` 0 keeps all tokens.  ``min_p`` drops tokens whose
    probability is below this share of the largest one.  ``repetition_penalty`` counts tokens of the prompt and of the
    answer; ``presence_penalty`` and ``frequency_penalty`` count tokens of the answer.  An answer ends before the first
    text in ``stop``, and after a token in ``stop_tokens``.  ``logprobs`` = n reports the log-probability of each chosen
    token, and of the n most likely tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits divided by a smaller temperature overflow.
        if self.temperature < 0 or 0 < self.temperature < 1e-6:
            raise ValueError(f"sampling.temperature={self.temperature}: use 0 for greedy, or 1e-6 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: use a number above 0 and at most 1")
        for name, (least, most, advice) in SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"sampling.{name}={value}: use {least} to {most}{advice}")
        for name, neutral in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                raise ValueError(
                    f"sampling.{name}={getattr(self, name)} has no effect at sampling.temperature=0, which is greedy: "
                    f"use a temperature above 0, or sampling.{name}={neutral}"
                )
        self._refuse_stop()

    def _refuse_stop(self) -> None:
        if "" in self.stop:
            raise ValueError("sampling.stop has an empty text: give texts of at least one character")
        if min(self.stop_tokens, default=0) < 0:
            raise ValueError(f"sampling.stop_tokens has {min(self.stop_tokens)}: use the ids of tokens, from 0")

    def for_answer(self, number: int) -> "Sampling":
        """Return the same settings with the seed of answer ``number`` of a batch: ``seed + number``, modulo 2**32."""
        return replace(self, seed=(self.seed + number) % 2**32)


@dataclass(frozen=True)
class Track:
    """Tracking of a run's metrics besides its ``metrics.jsonl``, which is always written."""

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
            raise ValueError(f"track.tags has {wrong[0]!r}: use tags of 1 to 64 characters")

    def of(self, kind: str) -> "Track":
        """Return these settings with ``job_type=kind``; settings that have a ``job_type`` are returned unchanged."""
        return self if self.job_type else replace(self, job_type=kind)
