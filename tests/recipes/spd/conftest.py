"""A tiny model, adapted once for all files of this folder."""

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors import safe_open

from recipes import spd_adapt
from recipes.common import cli as recipe_cli
from tests.tracking import wandb_below

TEXT = ("data.length=31", "data.end_token=false", "sequences=5", "chunk=2", "run.threads=1")
REPAIR = (
    "repair.sequences=24", "repair.length=31", "repair.held_out=5", "repair.calibration_sequences=3", "repair.epochs=2",
    "repair.batch=3", "repair.lr=5e-5", "repair.distil=[ISB,SB,ESB]", "repair.group=[ISB,SB,ESB]",
    "joint.steps=3", "joint.batch=2", "joint.lr=5e-5", "joint.save_every=2",
)  # fmt: skip
PROMPT = ("prompt.text=It was", "max_new_tokens=5", "verify=true", "run.threads=1")


@pytest.fixture(scope="session")
def adapted_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that recipes.spd_adapt writes for the tiny model; both of its blocks are repaired and drop."""
    out = tmp_path_factory.mktemp("adapted")
    words = [f"model={tiny}", "mesh.tp=3", "spd.budget=1", f"out={out}", "track=wandb", *TEXT, *REPAIR]
    with wandb_below(tmp_path_factory.mktemp("wandb")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spd_adapt", *words])
        try:
            recipe_cli.main("spd_adapt", spd_adapt.task)
        finally:
            GlobalHydra.instance().clear()
    return out


def tensors(folder: Path, name: str = "spd.safetensors") -> dict[str, list[float]]:
    """Values of every tensor in a safetensors file, by tensor name."""
    with safe_open(folder / name, "pt") as file:
        return {name: file.get_tensor(name).flatten().tolist() for name in sorted(file.keys())}
