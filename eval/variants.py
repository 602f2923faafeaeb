"""The models that are compared: the baseline, and what each variant changes of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from longctx.hf.config import tokenizer_of
from longctx.spd.plan import saved_plan
from recipes.common.cli import say
from recipes.common.renamed import rename_item
from recipes.common.target import Target, resolve_target

BASELINE = "baseline"
_SECTIONS = ("model", "mesh", "context", "spd")


@dataclass(frozen=True)
class Variant:
    """A named target to compare; the first of all is the baseline.  ``repaired``: its blocks learned to drop."""

    name: str
    target: Target
    repaired: bool = False

    @property
    def dropped(self) -> float:
        """Share of blocks that drop their reduction."""
        return self.target.plan.share if self.target.plan else 0.0

    @property
    def digest(self) -> str:
        """Digest of all that the variant's answers depend on."""
        target = self.target
        inputs: list[Any] = [target.fingerprint, target.model.dtype, target.model.layers, target.run.device]
        inputs += [str(target.mesh), vars(target.context), target.plan]
        # A generated text depends on what ends it, and on how tokens are read.
        inputs += [target.shape.end_tokens, *(file.read_bytes() for file in sorted(target.folder.glob("tokenizer*")))]
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]


def composed(config: DictConfig) -> list[tuple[str, DictConfig]]:
    """The configuration of the baseline, and of each of ``variants``: the same with some settings changed.

    With ``adapted`` each variant that drops blocks comes once more, as the model in that folder.
    Raises ValueError for a change of what is no setting of a model, and for a name that comes twice.
    """
    base: Any = OmegaConf.to_container(config, resolve=True)
    out = [(BASELINE, OmegaConf.create(base))]
    for given in base["variants"]:
        change = rename_item("variants", given, say)
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


def resolve_variant(name: str, config: DictConfig) -> Variant:
    """Return the variant that ``config`` describes.  Raises ValueError, with what to set instead, if it cannot run."""
    target = resolve_target(config, "eval.run", unused_axes=("dp", "pp"))
    if target.context.chunk:
        raise ValueError(
            f"context.chunk={target.context.chunk} is for one long prompt: use context.chunk=null; "
            "eval.max_batch_tokens bounds how many tokens are run at once"
        )
    return Variant(name, target, repaired=target.plan is not None and saved_plan(target.folder) is not None)


def refuse_other_model(base: Variant, other: Variant) -> None:
    """ValueError unless ``other`` reads the same tokens and was made from ``base``'s model, or is of its shape."""
    saved = saved_plan(other.target.folder)
    if saved and saved.source not in (base.target.fingerprint, getattr(saved_plan(base.target.folder), "source", None)):
        raise ValueError(
            f"variant {other.name}: {other.target.folder} was made from another model than {base.target.model.name}: "
            "give the baseline the one that it was made from"
        )
    if saved and other.target.plan and (bare := set(other.target.plan.dropped) - set(saved.adapted)):
        raise ValueError(
            f"variant {other.name}: block {min(bare)} of {other.target.folder} has not been repaired: drop fewer, or "
            "adapt it with a larger spd.budget"
        )
    alike = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab_size")
    for name in alike:
        ours, theirs = getattr(base.target.shape, name), getattr(other.target.shape, name)
        if ours != theirs:
            raise ValueError(
                f"variant {other.name}: {other.target.folder} has {theirs} for {name}, the baseline {ours}: "
                "compare variants of one model"
            )
    if (
        other.target.folder != base.target.folder
        and tokenizer_of(base.target.folder).get_vocab() != tokenizer_of(other.target.folder).get_vocab()
    ):
        raise ValueError(f"variant {other.name}: {other.target.folder} has another tokenizer than the baseline")
