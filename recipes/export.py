"""A checkpoint of a run, made on any mesh, becomes a Hugging Face folder that transformers loads.

python -m recipes.export checkpoint=outputs/tiny to=outputs/tiny/hf
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from longctx import checkpoint_index
from longctx.config import Mesh
from longctx.parallel.launch import Rank, run_ranks
from longctx.spd.plan import FILE as PLAN
from recipes.common.cli import console, main, warm_up_ranks
from recipes.common.settings import top_level


@dataclass(frozen=True)
class ExportSettings:
    """The settings of configs/export.yaml."""

    checkpoint: str
    to: str


def checkpoint_of(name: str) -> Path:
    """The checkpoint that ``name`` is, or the last whole one of the run that it is.  ValueError if there is none."""
    given = Path(name).expanduser().resolve()
    if (given / PLAN).is_file():
        raise ValueError(
            f"checkpoint={name} drops reductions between tensor-parallel ranks, which is no function of a single rank, "
            f"so transformers cannot run it: use model={name} here; with nothing dropped its function is its source's"
        )
    if (given / checkpoint_index.RUN).is_file():
        if wrong := checkpoint_index.fault_of(given):
            raise ValueError(f"checkpoint={name} is torn: {wrong}; give another of the run, or the run's folder")
        return given
    place, passed = checkpoint_index.latest(given / "checkpoints")
    if not place:
        why = f" ({'; '.join(passed)})" if passed else ""
        raise ValueError(f"checkpoint={name} is no checkpoint, and no run that has one{why}: give the out= of a run")
    return place


def run_rank(rank: Rank, place: Path, described: Path, dtype: str, to: Path) -> None:
    """Load on one rank, write."""
    from longctx.hf.config import shape_of
    from longctx.megatron.hf_io import export
    from longctx.megatron.model import build_model
    from longctx.megatron.runtime import runtime
    from longctx.megatron.training import checkpoint

    shape = shape_of(described)
    with runtime(rank, Mesh(), training=True) as here:
        net = build_model(shape, here.groups, dtype=getattr(torch, dtype), layers="local", device=torch.device("cpu"))
        checkpoint.load_weights(place, net)
        export.save(net, shape, to, described)


def prepare(config: DictConfig) -> tuple[Path, Path]:
    """The checkpoint, and the folder to write.  Raises ValueError if one is not there, or the other is."""
    settings = top_level(config, ExportSettings)
    place, to = checkpoint_of(settings.checkpoint), Path(settings.to).expanduser()
    if to.exists():
        raise ValueError(f"to={settings.to} is there already: give a folder that is not, or move it away")
    return place, to


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; export on one rank."""
    warm_up_ranks(["longctx.megatron.training.checkpoint", "longctx.megatron.hf_io.export"])
    place, to = prepare(config)
    told = checkpoint_index.about(place)
    if dropped := told["config"].get("dropped"):
        raise ValueError(
            f"{place} drops reductions of blocks {dropped[1:]} between {dropped[0]} tensor-parallel ranks, which is "
            "no function of a single rank, so transformers cannot run it: train with spd=none for a model to export"
        )
    run_ranks(1, run_rank, place, place.parents[1] / "model", told["config"]["model"]["dtype"], to)
    console.print(
        f"step {told['step']} of {place.parents[1]} written to {to}: AutoModelForCausalLM.from_pretrained({str(to)!r})"
    )


if __name__ == "__main__":
    main("export", task)
