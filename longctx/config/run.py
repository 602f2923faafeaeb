"""Sections of how a run computes: mesh, context parallelism, ranks, sampling, tracking."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

_YEAR = 366 * 24 * 60  # minutes


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis, fastest-varying first (arXiv 2405.07719, Tip 7).

    ``ep`` adds no ranks.  It divides the ulysses x ring x dp ranks into groups of ``ep`` neighbours.  The ranks of a
    group divide the experts of every layer among them.
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
        """Ranks in all."""
        return prod(ranks for axis, ranks in vars(self).items() if axis != "ep")

    @property
    def sequence_parallel(self) -> bool:
        """True if training shards activations between tensor-parallel layers by rows: always, at no extra traffic."""
        return self.tp > 1

    @property
    def context(self) -> int:
        """Number of ranks that share one sequence."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        used = [f"{axis}={ranks}" for axis, ranks in vars(self).items() if ranks > 1]
        return " ".join(used) or "one rank"


@dataclass(frozen=True)
class Context:
    """How context-parallel ranks share a sequence, and which tensors they exchange.

    ``strategy`` is the strategy of prefill, or a rule that chooses one for each turn: ``auto`` uses the cost model;
    ``alg1``, ``alg5`` and ``empirical`` are the rules of arXiv 2411.01783.  ``decode`` is the strategy of decoding.
    With ``sharded``, each context rank multiplies its share of the weights.  ``auto`` chooses ``sharded`` or
    ``gather_merge`` by the cost model.  ``chunk`` is the largest number of tokens in one prefill pass; None prefills
    all at once.
    """

    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "auto", "alg1", "alg5", "empirical"] = "pass_kv"
    decode: Literal["pass_kv", "pass_q", "all_gather_kv", "gather_merge", "sharded", "auto"] = "gather_merge"
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    kernel: Literal["auto", "reference", "flash_cpu", "flash_cuda", "cudnn", "flash_attn"] = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"context.chunk={self.chunk}: prefill at least one token at a time, or null for all")


@dataclass(frozen=True)
class Run:
    """Threads, device and timeout of the ranks.

    ``threads`` are CPU threads per rank (None: an even share of the machine's cores).  ``timeout_minutes`` is how long
    a rank waits for a silent one before the run fails.
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
    """How tokens are chosen: temperature 0 is greedy; a draw depends on ``seed`` and position, not on the mesh."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits divided by a smaller temperature overflow.
        if self.temperature < 0 or 0 < self.temperature < 1e-6:
            raise ValueError(f"sampling.temperature={self.temperature}: use 0 for greedy, or 1e-6 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sampling.seed={self.seed}: use 0 to {2**32 - 1}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: use a share above 0, up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"sampling.top_p={self.top_p} has no effect at sampling.temperature=0, which is greedy: "
                "use a temperature above 0, or sampling.top_p=1"
            )


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
