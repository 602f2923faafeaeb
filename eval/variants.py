"""The models that are compared: the baseline, and what each variant changes of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from longctx.attention.backends import kernel_for
from longctx.config import Context, Mesh, ModelSource
from longctx.hf.checkpoint import fingerprint, tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.spd.plan import SPDPlan, saved_plan
from recipes.common.cli import say, section
from recipes.common.spd_plan import plan_of

BASELINE = "baseline"
_SECTIONS = ("model", "mesh", "context", "spd")


@dataclass(frozen=True)
class Variant:
    """A model on a mesh; ``plan`` says which blocks drop a reduction.  The first of all is the baseline."""

    name: str
    model: ModelSource
    folder: Path
    shape: ModelShape
    mesh: Mesh
    context: Context
    plan: SPDPlan | None
    device: str
    repaired: bool = False

    @property
    def dropped(self) -> float:
        """The share of blocks that drop their reduction."""
        return self.plan.share if self.plan else 0.0

    @property
    def digest(self) -> str:
        """What its answers depend on."""
        of: list[Any] = [fingerprint(self.folder), self.model.dtype, self.model.layers, self.device]
        of += [str(self.mesh), vars(self.context), self.plan]
        # A generated text depends on what ends it, and on how tokens are read.
        of += [self.shape.end_tokens, *(file.read_bytes() for file in sorted(self.folder.glob("tokenizer*")))]
        return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


def composed(config: DictConfig) -> list[tuple[str, DictConfig]]:
    """The configuration of the baseline, and of each of ``variants``: the same with some settings changed.

    With ``adapted`` each variant that drops blocks comes once more, as the model in that folder.
    Raises ValueError for a change of what is no setting of a model, and for a name that comes twice.
    """
    base: Any = OmegaConf.to_container(config, resolve=True)
    out = [(BASELINE, OmegaConf.create(base))]
    for change in base["variants"]:
        out.append((_name(change), _changed(base, change)))
        if base["adapted"] and change.get("spd"):
            as_saved = {name: value for name, value in change["spd"].items() if name != "sensitivity"}
            repaired = {**change, "model": base["adapted"], "spd": {"sensitivity": None, **as_saved}}
            out.append((f"{_name(change)} repaired", _changed(base, repaired)))
    names = [name for name, _ in out]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"variants: {twice[0]} is there twice: give every variant a name of its own")
    return out


def _name(change: Mapping[str, Any]) -> str:
    if not isinstance(change.get("name"), str):
        raise ValueError(f"variants: {dict(change)} has no name")
    return str(change["name"])


def _changed(base: Mapping[str, Any], change: Mapping[str, Any]) -> DictConfig:
    changes = {name: value for name, value in change.items() if name != "name"}
    if unknown := set(changes) - set(_SECTIONS):
        raise ValueError(f"variants: {change['name']}: {min(unknown)} is not one of {', '.join(_SECTIONS)}")
    if isinstance(changes.get("model"), str):
        folder = Path(changes["model"]).expanduser()
        its_own = ("max_positions", "rope_theta", "rope_factor")
        nothing = dict.fromkeys(("wheel", "gguf", "sha256", "config", "tokenizer", *its_own))
        changes["model"] = {**nothing, "name": folder.name, "source": changes["model"]}
    merged = {name: {**base[name], **changes.get(name, {})} for name in _SECTIONS}
    merged["model"] = {name: value for name, value in merged["model"].items() if value is not None}
    return OmegaConf.create({**base, **merged})


def variant_of(name: str, config: DictConfig, device: str) -> Variant:
    """The variant that ``config`` describes.  Raises ValueError, with what to do instead, if it cannot be run."""
    mesh, context = section(config, "mesh", Mesh), section(config, "context", Context)
    refuse_unused(mesh, "eval.run", ("dp", "pp"))
    model = section(config, "model", ModelSource)
    if context.strategy not in STRATEGIES:
        raise ValueError(
            f"context.strategy={context.strategy} is for conversations: use one of {', '.join(STRATEGIES)}"
        )
    if context.chunk:
        raise ValueError(
            f"context.chunk={context.chunk} is for one long prompt: here eval.max_batch_tokens says how much is run"
        )
    kernel_for(context.kernel, device, model.dtype)
    folder = locate(model, say)
    tensor_files(folder)  # refuses a folder without weights
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    plan = plan_of(config, mesh, model, folder, shape)
    repaired = plan is not None and saved_plan(folder) is not None
    return Variant(name, model, folder, shape, mesh, context, plan, device, repaired=repaired)


def refuse_other_model(base: Variant, other: Variant) -> None:
    """ValueError unless ``other`` reads the same tokens and was made from ``base``'s model, or is of its shape."""
    saved = saved_plan(other.folder)
    if saved and saved.source not in (fingerprint(base.folder), getattr(saved_plan(base.folder), "source", None)):
        raise ValueError(
            f"variant {other.name}: {other.folder} was made from another model than {base.model.name}: "
            "give the baseline the one that it was made from"
        )
    if saved and other.plan and (bare := set(other.plan.dropped) - set(saved.adapted)):
        raise ValueError(
            f"variant {other.name}: block {min(bare)} of {other.folder} has not been repaired: drop fewer, or adapt it "
            "with a larger spd.budget"
        )
    alike = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab_size")
    for name in alike:
        ours, theirs = getattr(base.shape, name), getattr(other.shape, name)
        if ours != theirs:
            raise ValueError(
                f"variant {other.name}: {other.folder} has {theirs} for {name}, the baseline {ours}: "
                "compare variants of one model"
            )
    if other.folder != base.folder and tokenizer_of(base.folder).get_vocab() != tokenizer_of(other.folder).get_vocab():
        raise ValueError(f"variant {other.name}: {other.folder} has another tokenizer than the baseline")
