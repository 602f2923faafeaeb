"""Sections of the composed configuration as dataclasses; the type of every value is checked."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from longctx.config import Context, Mesh, ModelSource, PromptSource, Run, Sampling
from recipes.common.cli import say
from recipes.common.mistakes import unknown_setting, wrong_value
from recipes.common.overrides import PATHS, literal
from recipes.common.renamed import Say, rename_item

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")


def section(config: DictConfig, name: str, kind: type[Section]) -> Section:
    """Return section ``name`` of the configuration as a ``kind``, a dataclass.

    Raises ValueError, with the setting's full name, for an unknown setting or a value of another type.
    """
    return _validate(kind, as_dict(config[name]), f"{name}.")


_SECTIONS = {
    "mesh": Mesh, "model": ModelSource, "context": Context, "run": Run, "sampling": Sampling, "prompt": PromptSource,
}  # fmt: skip


def check_sections(config: DictConfig) -> None:
    """Raise ValueError, as `section` does, for a mistake in a section that all recipes share."""
    for name, kind in _SECTIONS.items():
        if isinstance(config.get(name), DictConfig):
            section(config, name, kind)


def sections(config: DictConfig, name: str, kind: type[Section], say: Say = say) -> tuple[Section, ...]:
    """Return each item of the list ``name`` as a ``kind`` (missing: none); ``say`` gets a line for each old name.

    Raises ValueError, with the setting's full name, if ``name`` is not a list of such items.
    """
    items = mappings_at(as_dict(config), name)
    return tuple(_validate(kind, rename_item(name, item, say), f"{name}.{i}.") for i, item in enumerate(items))


def top_level(config: DictConfig, kind: type[Section]) -> Section:
    """Return the top-level settings, which are in no section, as a ``kind``; a field of ``kind`` may also be a section.

    Raises ValueError, with the setting's name, for one that ``kind`` does not have or a value of another type.
    """
    names = [field.name for field in fields(kind)]
    values = as_dict(config).items()
    return _validate(kind, {name: value for name, value in values if name in names or not isinstance(value, dict)}, "")


def as_dict(config: DictConfig) -> dict[str, object]:
    """Return the configuration as plain values, interpolations resolved."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def as_config(values: Mapping[str, object]) -> DictConfig:
    """Return plain ``values`` as a configuration; ``${`` in their text does not begin an interpolation."""

    def escaped(value: object) -> object:
        if isinstance(value, Mapping):
            return {name: escaped(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [escaped(item) for item in value]
        return literal(value) if isinstance(value, str) else value

    return OmegaConf.create({name: escaped(value) for name, value in values.items()})


def mapping_at(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return the section ``name`` of plain ``values``, empty if it is missing or null.

    Raises ValueError if it is not a section.
    """
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}={section}: give its settings in braces: {name}={{...}}")
    return section


def mappings_at(values: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """Return the items of the list ``name`` of plain ``values``, each with settings, empty if it is missing or null.

    Raises ValueError if it is not a list of such items.
    """
    items = values.get(name)
    if items is None:
        return []
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{name}={items}: give a list with each item's settings in braces: {name}=[{{...}}]")
    return items


def _validate(kind: type[Section], values: Mapping[str, object], prefix: str) -> Section:
    names = [field.name for field in fields(kind)]
    if unknown := set(values) - set(names):
        raise ValueError(unknown_setting(f"{prefix}{min(unknown)}", [f"{prefix}{name}" for name in names]))
    for name, value in values.items():
        _refuse_unset(f"{prefix}{name}", value)
    try:
        section = TypeAdapter(kind).validate_python(values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        if "error" in first.get("ctx", {}):
            raise ValueError(str(first["ctx"]["error"])) from None  # raised by __post_init__ of ``kind``
        raise ValueError(wrong_value(prefix, invalid)) from None
    for name, value in values.items():
        _refuse_no_number(f"{prefix}{name}", value, getattr(section, name))
    return section


def _refuse_unset(name: str, value: object) -> None:
    """Raise ValueError if ``value`` of setting ``name`` is missing (``???`` in its YAML file) or an empty path."""
    if value == "???":
        raise ValueError(f"{name} is not given: add {name}=VALUE (--help says what it is)")
    if name in PATHS and isinstance(value, str) and not value.strip():
        raise ValueError(f"{name}= is empty: give {name}=PATH")


def _refuse_no_number(name: str, given: object, value: object) -> None:
    """Raise ValueError if setting ``name`` has infinity, NaN, true or false in the place of a number.

    ``given`` is the value in the configuration, ``value`` is what it was read as.
    """
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{name}={given}: use a finite number")
    if isinstance(given, bool) and not isinstance(value, bool):
        raise ValueError(f"{name}={str(given).lower()}: use a number, not true or false")
    if isinstance(given, Mapping):
        members = vars(value) if is_dataclass(value) else value
        for key in given:
            assert isinstance(members, Mapping)
            _refuse_no_number(f"{name}.{key}", given[key], members[key])
    elif isinstance(given, list | tuple) and isinstance(value, list | tuple):
        for number, (item, item_value) in enumerate(zip(given, value, strict=True)):
            _refuse_no_number(f"{name}.{number}", item, item_value)
