"""``--help`` of a recipe, from its YAML files: examples, choices with a line each, settings with their comments."""

import re
from pathlib import Path

import yaml

from recipes.common.overrides import CONFIGS, choices, experiments_of

_WIDTH = 24


def help_of(config_name: str) -> str:
    """Return the help text of the recipe whose configuration is ``config_name``."""
    text = _file(config_name).read_text()
    parts = [yaml.safe_load(text)["hydra"]["help"]["template"].strip(), ""]
    if groups := _groups(config_name):
        parts += ["Choices, as group=name; the default is marked *:", *groups, ""]
    parts += ["Settings, as key=value:", *_settings(config_name)]
    return "\n".join(parts) + "\n"


def _file(config_name: str) -> Path:
    return CONFIGS / f"{config_name}.yaml"


def _lineage(config_name: str) -> list[str]:
    """Return ``config_name`` and the recipes' configurations whose settings it inherits, the nearest first."""
    lineage = [config_name]
    for entry in _defaults(config_name):
        if isinstance(entry, str) and entry.strip("/") not in ("_self_", "recipe"):
            lineage += _lineage(entry.strip("/"))
    return lineage


def _defaults(config_name: str) -> list[str | dict[str, str | None]]:
    defaults: list[str | dict[str, str | None]] = yaml.safe_load(_file(config_name).read_text())["defaults"]
    return defaults


def _chosen(config_name: str) -> dict[str, str | None]:
    """Return the default choice of each configuration group (such as model or mesh) of the recipe, by group."""
    chosen: dict[str, str | None] = {}
    for name in reversed(_lineage(config_name)):
        for entry in _defaults(name):
            if isinstance(entry, dict):
                for group, choice in entry.items():
                    chosen[group.removeprefix("override ").strip("/")] = choice
    return chosen


def _groups(config_name: str) -> list[str]:
    lines = []
    for group, default in _chosen(config_name).items():
        if group.startswith("hydra"):
            continue
        names = experiments_of(config_name) if group == "experiment" else choices(group)
        for name in names:
            mark = "*" if name == default else " "
            lines.append(f"  {mark} {f'{group}={name}':{_WIDTH}} {_first_line(CONFIGS / group / f'{name}.yaml')}")
        if group == "model":
            lines.append(
                f"    {'model=PATH or ORG/NAME':{_WIDTH}} a Hugging Face folder, a GGUF file, or a name on the hub"
            )
    return lines


def _first_line(file: Path) -> str:
    """Return the first comment of a YAML file that is not a directive, or an empty line."""
    for line in file.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").rstrip()
    return ""


def _settings(config_name: str) -> list[str]:
    """Return the settings of the recipe and of its groups, with the comments of their files."""
    lines: list[str] = []
    for name in _lineage(config_name):
        lines += _body(_file(name), "")
    for group, choice in _chosen(config_name).items():
        if choice and group != "experiment" and not group.startswith("hydra"):
            lines += [f"{group}:"] + [line for file in _bases(group, choice) for line in _body(file, "  ")]
    return [f"  {line}" for line in lines]


def _bases(group: str, choice: str) -> list[Path]:
    """Return the YAML files that the choice ``choice`` of ``group`` inherits from, and after them its own file."""
    file = CONFIGS / group / f"{choice}.yaml"
    defaults = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return [path for entry in bases for path in _bases(group, entry)] + [file]


def _body(file: Path, indent: str) -> list[str]:
    """Return the lines of a YAML file, indented by ``indent``, without its defaults list and Hydra's section.

    The comment at the beginning of a choice's file is left out, since the list of choices shows it.  The comment
    of a file whose name begins with ``_``, from which choices inherit, stays.
    """
    text = re.sub(r"(?m)^defaults:\n(?:  .*\n)+", "", file.read_text())
    text = re.sub(r"(?ms)^hydra:\n.*", "", text)
    lines = text.splitlines()
    while lines and (not lines[0].strip() or (lines[0].startswith("#") and not file.name.startswith("_"))):
        lines.pop(0)
    return [f"{indent}{line}".rstrip() for line in lines if line.strip()]
