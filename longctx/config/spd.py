"""Sync-Point-Drop: blocks that drop a reduction, and their repair."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SPD:
    """Blocks that drop their first reduction over tensor-parallel ranks (`longctx.spd`).

    ``drop="saved"`` takes the blocks that the plan in the model's folder names; without a plan, no block drops.  With
    ``budget``, the least sensitive blocks drop instead, up to this share of all blocks; the order is that of the file
    ``sensitivity`` or of that plan.  ``drop="ranked"`` requires ``budget``.  ``blocks`` lists blocks, counted from 0,
    and allows neither ``budget`` nor another ``drop``.
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
PositionWeights = Literal["uniform", "beginnings"]


@dataclass(frozen=True)
class Repair:
    """Block-to-block repair of dropped reductions (arXiv 2502.20727, 4.2); configs/spd_adapt.yaml explains each field.

    ``distil``, ``group`` and ``fit`` name the classes of blocks that each of these steps repairs.  Blocks are trained
    on ``sequences`` sequences of ``length`` tokens.  ``weights`` says how much each position of a sequence counts.
    Errors and guards are measured on ``held_out`` further sequences; ``guard`` says what happens if a guard fails.
    Grouping and fitting use the first ``calibration_sequences``.
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
    weights: PositionWeights = "uniform"
    guard: Literal["refuse", "warn", "off"] = "refuse"

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "held_out", "calibration_sequences", "epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"repair.{name}={getattr(self, name)}: use more than 0")
        if self.batch > self.sequences:
            raise ValueError(
                f"repair.batch={self.batch} is more than repair.sequences={self.sequences}: use a smaller batch"
            )
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
