"""A folder with a model whose blocks may drop a reduction: every tensor as it was, those for dropped blocks beside."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from longctx.hf.checkpoint import ADAPTED, DROPPED, tensor_files
from longctx.hf.scratch import write_like
from longctx.shapes import Tensor
from longctx.spd.plan import SavedPlan

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def write_block(file: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """A block's ``tensors``, and what is ``told`` of them, wholly or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coming = file.with_suffix(".coming")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, coming, metadata=dict(told))
    coming.replace(file)


def read_block(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_block` wrote."""
    with safe_open(file, "pt") as found:
        return {name: found.get_tensor(name) for name in sorted(found.keys())}, found.metadata()


def assemble(source: Path, files: Iterable[Path], saved: SavedPlan, to: Path) -> None:
    """Put into ``to`` the model of ``source`` with the blocks in ``files`` and their plan; anew, if it is there.

    transformers does not find its weights: with nothing dropped they are the source's, and else of no use to it.
    """
    tensors = {}
    for name, file in tensor_files(source).items():
        with safe_open(file, "pt") as found:
            tensors[name] = found.get_tensor(name)
    if saved.plan.own_norms:  # so that any other block may drop as well
        each = [f"model.layers.{block}.{norm}" for block in range(saved.plan.layers) for norm in _NORMS]
        tensors |= {DROPPED + name: tensors[name].repeat(saved.plan.tp) for name in each}
    for file in files:
        tensors |= {DROPPED + name: tensor for name, tensor in read_block(file)[0].items()}
    with tempfile.TemporaryDirectory(dir=to, prefix=".coming-") as work:
        folder = Path(work, "model")
        write_like(source, {}, folder)
        saved.write(folder)
        save_file(tensors, folder / ADAPTED, metadata={"format": "pt"})
        (to / "config.json").unlink(missing_ok=True)
        # config.json, by which a folder is a model, comes last.
        for made in sorted(folder.iterdir(), key=lambda made: made.name == "config.json"):
            made.replace(to / made.name)
