"""What Sync-Point-Drop is asked to do: sections of the configuration, as `longctx.schema` has the others."""

from dataclasses import dataclass
from typing import Literal


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
    ``held_out`` more report errors, and grouping and fitting look at the first ``looked_at``.
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
    looked_at: int
    epochs: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "held_out", "looked_at", "epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"repair.{name}={getattr(self, name)}: use more than 0")
        if self.batch > self.sequences:
            raise ValueError(f"repair.batch={self.batch} of repair.sequences={self.sequences}: take fewer a step")
        if self.looked_at > self.sequences:
            raise ValueError(
                f"repair.looked_at={self.looked_at} of repair.sequences={self.sequences}: look at fewer, the others "
                "are held out"
            )


@dataclass(frozen=True)
class Joint:
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
