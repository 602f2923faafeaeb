"""The models to compare: the baseline, and variants with some of its settings changed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from longctx.hf.checkpoint import of_first_version, same_model
from longctx.hf.config import tokenizer_of
from longctx.spd.plan import saved_plan
from recipes.common.cli import say
from recipes.common.renamed import rename_item
from recipes.common.settings import as_config, as_dict, mapping_at, mappings_at
from recipes.common.target import Target, resolve_target

BASELINE = "baseline"
_SECTIONS = ("model", "mesh", "context", "spd", "reduce")
# A digest is the name of a file of answers.  Values that have been renamed since are hashed by their first name.
_FIRST_NAMES = {"gather_merge": "one_exchange"}
Values = Mapping[str, object]  # a composed configuration, or a part of one, as plain values


@dataclass(frozen=True)
class Variant:
    """A named target to compare; the first of all is the baseline.

    ``repaired``: the model's folder was adapted to the reductions that it drops.
    """

    name: str
    target: Target
    repaired: bool = False

    @property
    def dropped(self) -> float:
        """Share of blocks that drop their reduction."""
        return self.target.plan.share if self.target.plan else 0.0

    @property
    def digest(self) -> str:
        """Digest of everything that the variant's answers depend on; it is the name of the file of its answers.

        The same settings must give the same digest in every release: otherwise stored answers are not found, and all
        are computed again.  The digest covers the model with its dtype and layers, device, mesh (without ``dp``),
        context, plan, rounded reductions, end tokens and tokenizer files.
        """
        return self._digest(self.target.fingerprint)

    @property
    def first_digest(self) -> str:
        """The digest that version 0.1 gave these settings; it finds the answers that version 0.1 stored.

        Version 0.1 computed the model's fingerprint in another way.
        """
        return self._digest(of_first_version(self.target.fingerprint))

    def _digest(self, fingerprint: str) -> str:
        target = self.target
        context = vars(target.context) | {"decode": _FIRST_NAMES.get(target.context.decode, target.context.decode)}
        del context["check_schedule"]  # changes no answer
        inputs: list[object] = [fingerprint, target.model.precision, target.model.layers, target.run.device]
        mesh = replace(target.mesh, dp=1)  # changes no answer
        inputs += [str(mesh), context, target.plan, *([target.reduce] if target.reduce else [])]
        # A generated text depends on the tokens that end it, and on how text is tokenized.
        inputs += [target.shape.end_tokens, *(file.read_bytes() for file in sorted(target.folder.glob("tokenizer*")))]
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]


_SOURCES = {"name", "source", "wheel", "gguf", "sha256", "config", "tokenizer"}  # settings that say which model it is


def compose_variants(config: DictConfig) -> list[tuple[str, DictConfig]]:
    """Return name and whole configuration of the baseline and of each item of ``variants``.

    Example: ``variants=[{name: ring, mesh: {ring: 2}}]`` gives the baseline, and the same with mesh.ring=2.  With
    ``adapted``, each variant that sets ``spd`` is added a second time as "NAME repaired", with the model in that
    folder.

    Raises ValueError for

    * an item without a name, and a name that is used twice;
    * a section that variants cannot change;
    * an ``adapted`` folder that no variant uses.
    """
    base = as_dict(config)
    variants = [(BASELINE, as_config(base))]
    for item in mappings_at(base, "variants"):
        change = rename_item("variants", item, say)
        name = _name(change)
        variants.append((name, _apply(base, change)))
        if base["adapted"] and change.get("spd"):
            # The adapted folder has an order of blocks; the variant's file belongs to the model without repair.
            spd = {key: value for key, value in mapping_at(change, "spd").items() if key != "sensitivity"}
            own = {} if isinstance(change.get("model"), str) else mapping_at(change, "model")
            if isinstance(change.get("model"), str) or _SOURCES.intersection(own):
                raise ValueError(
                    f"variants: {name} has a model, and adapted={base['adapted']} is another one: leave one of them out"
                )
            model = {**_in_folder(str(base["adapted"])), **own}
            repaired = {**change, "model": model, "spd": {"sensitivity": None, **spd}}
            variants.append((f"{name} repaired", _apply(base, repaired)))
    names = [name for name, _ in variants]
    if base["adapted"] and len(variants) == 1 + len(mappings_at(base, "variants")):
        raise ValueError(
            f"adapted={base['adapted']} is not used, as no variant sets spd: leave it out, or add one that does"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"variants: the name {repeated[0]} is used twice: give each variant another name")
    return variants


def _name(change: Values) -> str:
    if not isinstance(change.get("name"), str) or not str(change["name"]).strip():
        raise ValueError(f"variants: {dict(change)} has no name: add one, such as name: ring")
    return str(change["name"])


def _apply(base: Values, change: Values) -> DictConfig:
    """Return the configuration ``base`` with the sections of ``change`` merged into it."""
    changes = {name: value for name, value in change.items() if name != "name"}
    if unknown := set(changes) - set(_SECTIONS):
        raise ValueError(
            f"variants: {change['name']}: {min(unknown)} is not one of {', '.join(_SECTIONS)}: leave it out"
        )
    if isinstance(source := changes.get("model"), str):
        changes["model"] = _in_folder(source)
    merged = {name: {**mapping_at(base, name), **mapping_at(changes, name)} for name in _SECTIONS}
    merged["model"] = {name: value for name, value in merged["model"].items() if value is not None}
    return as_config({**base, **merged})


def _in_folder(source: str) -> dict[str, object]:
    """Return the section ``model`` of a variant whose model is in the folder ``source``.

    Nothing of the baseline's source, nor of its changed context, applies to it.
    """
    context = ("max_positions", "rope_theta", "rope_factor", "rope_type")
    cleared = dict.fromkeys(("wheel", "gguf", "sha256", "config", "tokenizer", *context))
    return {**cleared, "name": Path(source).expanduser().name, "source": source}


def resolve_variant(name: str, config: DictConfig) -> Variant:
    """Return the variant ``name`` that ``config`` describes.  Raises ValueError, with what to set, if it cannot run."""
    target = resolve_target(config, "eval.run", unused_axes=("pp",), fp8=("block",))
    if target.context.chunk:
        raise ValueError(
            f"context.chunk={target.context.chunk} is for one long prompt: use context.chunk=null; "
            "eval.max_batch_tokens bounds how many tokens are run at once"
        )
    return Variant(name, target, repaired=target.plan is not None and saved_plan(target.folder) is not None)


def refuse_other_template(baseline: Variant, variant: Variant) -> None:
    """Raise ValueError unless ``variant`` has the baseline's chat template, in which all variants are asked."""
    from longctx.hf.config import tokenizer_of

    if tokenizer_of(variant.target.folder).chat_template != tokenizer_of(baseline.target.folder).chat_template:
        raise ValueError(
            f"variant {variant.name} has another chat template than the baseline, in whose template eval.chat asks "
            "all variants: evaluate it by itself, or use eval.chat=false"
        )


def refuse_other_model(baseline: Variant, variant: Variant) -> None:
    """Raise ValueError unless ``variant`` has the baseline's shape and tokenizer.

    An adapted folder must have been made from the baseline's model, and be repaired for all blocks that it drops.
    """
    base, other, name = baseline.target, variant.target, variant.name
    # 1. Adapted folders.
    saved, saved_base = saved_plan(other.folder), saved_plan(base.folder)
    sources = [base.fingerprint, *([saved_base.source] if saved_base else [])]
    if saved and not any(same_model(saved.source, source) for source in sources):
        raise ValueError(
            f"variant {name}: {other.folder} was made from another model than {base.model.name}: "
            "use the model that it was made from as the baseline"
        )
    if saved and other.plan and (unrepaired := set(other.plan.dropped) - set(saved.adapted)):
        raise ValueError(
            f"variant {name}: block {min(unrepaired)} of {other.folder} has not been repaired: use a smaller "
            "spd.budget, or adapt it with a larger one"
        )
    # 2. Shape.
    for dimension in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab_size"):
        expected, value = getattr(base.shape, dimension), getattr(other.shape, dimension)
        if value != expected:
            raise ValueError(
                f"variant {name}: {other.folder} has {dimension}={value}, but the baseline has {expected}: "
                "compare variants of one model"
            )
    # 3. Tokenizer: variants answer the baseline's requests, which are token ids.
    if other.folder != base.folder and tokenizer_of(base.folder).get_vocab() != tokenizer_of(other.folder).get_vocab():
        raise ValueError(
            f"variant {name}: {other.folder} has another tokenizer than the baseline: compare variants of one model"
        )
