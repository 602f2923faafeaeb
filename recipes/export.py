"""Export a checkpoint, written on any mesh, to a Hugging Face folder that transformers loads.

python -m recipes.export checkpoint=outputs/tiny to=outputs/tiny/hf
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from longctx import checkpoint_index
from longctx.config import LoRA, Mesh
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank, run_ranks
from longctx.spd.plan import FILE as PLAN
from recipes.common.cli import console, main, say, warm_up_ranks
from recipes.common.lock import hold, lock_beside
from recipes.common.places import nearest_existing, refuse_unwritable_folder
from recipes.common.settings import as_config, section, top_level
from recipes.common.train_resume import weights_of


@dataclass(frozen=True)
class ExportSettings:
    """Settings of configs/export.yaml.

    ``checkpoint`` is a checkpoint's folder, or a run's, whose last whole checkpoint is taken.  ``to`` is the folder to
    write, which must not exist.
    """

    checkpoint: str
    to: str


def checkpoint_of(name: str) -> Path:
    """Return the folder of a checkpoint; ``name`` is that folder, or the folder of a run.

    In a run, it is the last checkpoint that is complete and not corrupt; later ones are skipped, and printed.  Raises
    ValueError if there is no such checkpoint, if the named one is corrupt, and for an adapted model, which transformers
    cannot run.
    """
    folder = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100, removes x/.. and follows no links
    if (folder / PLAN).is_file():
        raise ValueError(
            f"checkpoint={name} is a model whose blocks drop reductions between tensor-parallel ranks: its output "
            "depends on the number of ranks, and transformers cannot run it; run it with longctx "
            f"(model={name}), or give transformers the model that it was adapted from"
        )
    if (folder / checkpoint_index.RUN).is_file():
        if wrong := checkpoint_index.content_fault_of(folder):
            raise ValueError(f"checkpoint={name} is corrupt: {wrong}; give another checkpoint, or the run's folder")
        return folder
    place, passed_over = checkpoint_index.latest_whole(folder / "checkpoints", checkpoint_index.content_fault_of)
    if not place:
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise ValueError(f"checkpoint={name} is neither a checkpoint nor a run with one{why}: give the out= of a run")
    for reason in passed_over:
        say(f"checkpoint skipped: {reason}")
    return place


def run_rank(rank: Rank, checkpoint_folder: Path, scratch: Path, dtype: str, lora: LoRA, to: Path) -> float:
    """Load the checkpoint on one rank, merge its adapters if it has any, and write the folder ``to``.

    ``scratch`` is the folder with the model's configuration and tokenizer; ``dtype`` is that of the run.  A ``lora`` of
    rank None means no adapters.  With adapters, all weights are written in float32.  Returns the `rounded_share` of a
    merge in ``dtype``.
    """
    import torch

    from longctx.megatron.hf_io import export
    from longctx.megatron.lora import attach_adapters, merge_adapters, rounded_share
    from longctx.megatron.model import build_model
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training import checkpoint

    shape = shape_of(scratch)
    with open_runtime(rank, Mesh(), training=True) as groups:
        net = build_model(shape, groups.groups, dtype=getattr(torch, dtype), layers="local", device=torch.device("cpu"))
        if lora.rank:
            attach_adapters(net, lora, seed=0)
        checkpoint.load_weights(checkpoint_folder, net)
        share = rounded_share(net)
        if lora.rank:
            merge_adapters(net.float())
        export.save(net, shape, to, scratch)
        return share


def prepare(config: DictConfig) -> tuple[Path, Path]:
    """Return the checkpoint to read and the folder to write.

    Raises ValueError for a checkpoint that cannot be exported, and for a folder that exists or cannot be written.
    """
    settings = top_level(config, ExportSettings)
    place, to = checkpoint_of(settings.checkpoint), Path(settings.to).expanduser()
    if to.exists():
        raise ValueError(f"to={settings.to} exists already: give a new folder, or move this one away")
    refuse_unwritable_folder(settings.to, "to")
    refuse_unexportable(place, to)
    return place, to


def refuse_unexportable(place: Path, to: Path) -> None:
    """Raise ValueError if checkpoint ``place`` drops reductions, or if its weights do not fit on the disk of ``to``.

    Also raises ValueError if the run's ``model`` folder is missing.
    """
    import torch

    if not (model_of(place) / "config.json").is_file():
        raise ValueError(
            f"checkpoint={place}: a checkpoint is exported together with the configuration and tokenizer of its run, "
            f"in RUN/model, but {model_of(place)} has no config.json: copy both, to RUN/checkpoints/{place.name} and "
            "RUN/model, then give checkpoint=RUN"
        )
    config = checkpoint_index.read_metadata(place)["config"]
    if dropped := config.get("dropped"):
        raise ValueError(
            f"blocks {dropped[1:]} of {place} drop reductions between {dropped[0]} tensor-parallel ranks: the model's "
            "output depends on the number of ranks, and transformers cannot run it; to get a model that can be "
            "exported, train with spd=none"
        )
    dtype = "float32" if lora_of(config).rank else config["model"]["dtype"]
    needed = weights_of(shape_of(model_of(place))) * getattr(torch, dtype).itemsize
    if (free := shutil.disk_usage(nearest_existing(to)).free) < needed:
        raise ValueError(
            f"to={to} has {free / 1e9:.2f} GB free, but the weights take {needed / 1e9:.2f} GB: give a to= on another "
            "disk"
        )


def model_of(place: Path) -> Path:
    """Return the folder with the configuration and tokenizer of checkpoint ``place``."""
    return run_of(place) / "model"


def run_of(place: Path) -> Path:
    """Return the folder of the run of checkpoint ``place``, which may be a link into a run, or a link in a run."""
    near, linked = place.parent.parent, place.resolve().parent.parent  # a checkpoint may be in the folder /
    runs = (near, linked) if place.parent.name == "checkpoints" else (linked, near)
    return next((run for run in runs if (run / "model" / "config.json").is_file()), runs[0])


def lora_of(config: Mapping[str, Any]) -> LoRA:
    """Return the settings of adapters in a checkpoint's ``config``; for version 0.1, those of no adapters."""
    return section(as_config({"lora": config["lora"]}), "lora", LoRA) if "lora" in config else LoRA()


def task(config: DictConfig) -> None:
    """Check the configuration, then export on one rank."""
    warm_up_ranks(["longctx.megatron.training.checkpoint", "longctx.megatron.hf_io.export"])
    place, to = prepare(config)
    metadata = checkpoint_index.read_metadata(place)
    dtype, lora = metadata["config"]["model"]["dtype"], lora_of(metadata["config"])
    if line := checkpoint_index.unchecked_line(place):
        say(line)
    with hold(lock_beside(to), f"to={to}"):
        (share,) = run_ranks(1, run_rank, place, model_of(place), dtype, lora, to)
    if lora.rank and dtype == "bfloat16":
        say(
            f"adapters are merged in float32: in bfloat16, rounding would change the weights by {share:.0%} of what "
            "the adapters add (in norm); use the folder in float32, too"
        )
    console.print(
        f"step {metadata['step']} of {run_of(place)} written to {to}: AutoModelForCausalLM.from_pretrained({str(to)!r})"
    )


if __name__ == "__main__":
    main("export", task)
