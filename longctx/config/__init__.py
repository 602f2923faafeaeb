"""Sections of a run's configuration: frozen dataclasses with their defaults, shown and chosen in configs/."""

from longctx.config.model import ModelSource, PromptSource
from longctx.config.run import Context, Mesh, Reduce, ReduceDtype, Run, Sampling, Track
from longctx.config.spd import SPD, BlockClass, JointRepair, PositionWeights, Repair
from longctx.config.training import DataSettings, LoRA, Optim, Recompute, TextSource

__all__ = [
    "SPD",
    "BlockClass",
    "Context",
    "DataSettings",
    "JointRepair",
    "LoRA",
    "Mesh",
    "ModelSource",
    "Optim",
    "PositionWeights",
    "PromptSource",
    "Recompute",
    "Reduce",
    "ReduceDtype",
    "Repair",
    "Run",
    "Sampling",
    "TextSource",
    "Track",
]
