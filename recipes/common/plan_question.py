"""The question that a plan answers: a model, a machine, the work and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from longctx.config import Mesh, Recompute
from longctx.cost.decode import SHARED_ROWS
from longctx.cost.forward import Numbers
from longctx.cost.machine import Machine
from longctx.model_shape import ModelShape
from longctx.parallel.strategy import STRATEGIES
from recipes.common.spd_report import NO_DROP, AllowedDrop


@dataclass(frozen=True)
class WorkSettings:
    """The section ``work`` (configs/work): kind and size of the work; in training also ZeRO-1 and recomputation.

    ``context`` counts the new tokens of each of ``batch`` sequences; in decoding, the tokens in its cache.  Only a chat
    has ``cached`` tokens before them, and ``new_tokens`` of an answer after them.
    """

    kind: Literal["prefill", "decode", "chat", "train"] = "prefill"
    context: PositiveInt = 131072
    cached: NonNegativeInt = 0
    new_tokens: NonNegativeInt = 0
    batch: PositiveInt = 1
    zero1: bool = False
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if self.kind != "chat" and (self.cached or self.new_tokens):
            raise ValueError(f"work={self.kind} has no work.cached or work.new_tokens: use work=chat")
        if self.kind != "train" and (self.zero1 or self.recompute != "none"):
            raise ValueError(f"work={self.kind} has no work.zero1 or work.recompute: use work=train")

    @property
    def total(self) -> int:
        """Tokens of a sequence at the end of the work."""
        return self.cached + self.context + self.new_tokens

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies that the work can use."""
        return (*SHARED_ROWS, *STRATEGIES) if self.kind == "decode" else tuple(STRATEGIES)


@dataclass(frozen=True)
class Question:
    """Everything that determines the plans: a model's shape, a machine, the number of GPUs, the work and its limits.

    ``dtype_bytes`` is the size of a weight and of an activation.  ``strategy`` None plans for all strategies.
    ``max_ttft_s`` None sets no limit; ``max_memory_gb`` None takes the machine's memory of a GPU as the limit.
    ``allowed_drop`` is the largest share of blocks that drop a reduction on meshes with tensor parallelism.
    ``operations`` are those of layers on a GPU or on a CPU, for the memory of training.
    """

    shape: ModelShape
    machine: Machine
    gpus: int
    work: WorkSettings
    dtype_bytes: int = 2
    strategy: str | None = None
    allowed_drop: AllowedDrop = NO_DROP
    max_ttft_s: float | None = None
    max_memory_gb: float | None = None
    operations: Literal["cuda", "cpu"] = "cuda"

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies to plan for: the given one, those that ``auto`` compares, or all of the work's."""
        if self.strategy == "auto":
            return SHARED_ROWS if self.work.kind == "decode" else ("pass_kv", "pass_q")
        return (self.strategy,) if self.strategy else self.work.strategies

    @property
    def memory_gb(self) -> float | None:
        """Limit of a GPU's memory in GB: ``max_memory_gb``, else the machine's; None if neither is given."""
        machine = self.machine.memory_bytes
        return self.max_memory_gb or (machine / 1e9 if machine else None)

    @property
    def experts(self) -> int:
        """Number of experts that ranks can divide; 1 for a model without experts."""
        return self.shape.mixture.count if self.shape.mixture else 1

    @property
    def drop_share(self) -> float:
        """Share of the blocks that drop a reduction: the most whole blocks that ``allowed_drop`` allows."""
        layers = self.shape.layers
        return floor(self.allowed_drop.share * layers + 1e-9) / layers

    def numbers(self, mesh: Mesh) -> Numbers:
        """Return the bytes per element, and the share of blocks that drop a reduction on ``mesh``.

        Weights of feed-forward networks may have fewer bytes in inference.  The share is 0 without tensor parallelism,
        and if ``mesh.tp`` is not the one that ``allowed_drop`` was measured for.
        """
        ffn = self.machine.ffn_element_bytes
        small = ffn if ffn and self.dtype_bytes == 2 and self.work.kind != "train" else self.dtype_bytes
        drops = mesh.tp > 1 and self.allowed_drop.tp in (None, mesh.tp)
        return Numbers(self.dtype_bytes, small, self.drop_share if drops else 0.0)
