"""Old names of settings, accepted for one release: each use prints one line that gives the new name."""

import re
from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf, open_dict

# Old name -> new name, as dotted keys of the configuration.
SETTINGS = {
    "threads": "run.threads",
    "device": "run.device",
    "timeout_minutes": "run.timeout_minutes",
    "model.positions": "model.max_positions",
    "eval.longest": "eval.max_length",
    "eval.together": "eval.max_batch_tokens",
    "repair.looked_at": "repair.calibration_sequences",
}
# Setting -> old value -> new value.
VALUES = {
    "context.decode": {"one_exchange": "gather_merge"},
    "experiment": {"demo": "generate/demo", "tiny": "pretrain/tiny", "spd_regression": "evaluate/spd_regression"},
}
# List setting -> old key of its items -> new key; an item's sections follow `SETTINGS` and `VALUES`.
ITEMS = {"texts": {"called": "label"}, "models": {"called": "label"}}

Say = Callable[[str], None]

# The dotted name of a list item's setting, such as texts.0.label.
_ITEM = re.compile(r"(?P<prefix>(?P<setting>\w+)\.\d+\.)(?P<key>.+)")


def rename_override(word: str, say: Say) -> str:
    """Return ``word``, a ``key=value`` of the command line, with an old key or value replaced by its current name.

    If it is replaced, ``say`` receives a line with the current name.
    """
    key, equals, value = word.partition("=")
    if not equals:
        return word
    prefix, bare = ("++", key[2:]) if key.startswith("++") else ("", key)
    prefix, bare = (key[0], key[1:]) if not prefix and key.startswith(("+", "~")) else (prefix, bare)
    name, new_value = SETTINGS.get(bare, bare), VALUES.get(bare, {}).get(value, value)
    if (name, new_value) != (bare, value):
        say(f"{bare}={value} is an old name: use {name}={new_value}")
    return f"{prefix}{name}={new_value}"


def rename_settings(config: DictConfig, say: Say) -> DictConfig:
    """Replace old names and values in ``config``, such as a user's experiment file has, in place; return ``config``.

    ``say`` receives a line for each.
    """
    with open_dict(config):
        for old, new in SETTINGS.items():
            section, _, key = old.rpartition(".")
            holder = OmegaConf.select(config, section) if section else config
            if not isinstance(holder, DictConfig) or key not in holder:
                continue
            value = holder.pop(key)
            say(f"{old}={_as_word(value)} is an old name: use {new}={_as_word(value)}")
            OmegaConf.update(config, new, value)
        for name, values in VALUES.items():
            value = OmegaConf.select(config, name, throw_on_missing=False)
            if isinstance(value, str) and value in values:
                say(f"{name}={value} is an old name: use {name}={values[value]}")
                OmegaConf.update(config, name, values[value])
    return config


def _as_word(value: object) -> str:
    return "null" if value is None else str(value)


def rename_flat(values: Mapping[str, object]) -> dict[str, object]:
    """Return ``values`` of a saved manifest or result, by dotted name, with their current names and values.

    ``texts.0.called`` becomes ``texts.0.label``.  Settings of a list's items are renamed like the recipe's own:
    ``variants.0.context.decode=one_exchange`` becomes ``gather_merge``.
    """
    renamed = {}
    for name, value in values.items():
        item = _ITEM.fullmatch(name)
        prefix, key = (item["prefix"], item["key"]) if item else ("", name)
        old_keys = {**SETTINGS, **ITEMS.get(item["setting"], {})} if item else SETTINGS
        old_values = {**VALUES, "decode_strategy": VALUES["context.decode"]}.get(key, {})
        new_value = old_values.get(value, value) if isinstance(value, str) else value
        renamed[prefix + old_keys.get(key, key)] = new_value
    return renamed


def rename_item(setting: str, item: Mapping[str, object], say: Say) -> dict[str, object]:
    """Return ``item`` of the list ``setting`` (``variants``, ``texts``, ``models``) with current names and values.

    ``say`` receives a line for each old one.
    """
    renamed: dict[str, object] = {}
    for key, value in item.items():
        name = ITEMS.get(setting, {}).get(key, key)
        if name != key:
            say(f"{setting}: {key} is an old name: use {name}")
        renamed[name] = value
    nested = OmegaConf.create({key: value for key, value in renamed.items() if isinstance(value, Mapping)})
    plain = OmegaConf.to_container(rename_settings(nested, say))
    assert isinstance(plain, dict)
    return renamed | {str(key): value for key, value in plain.items()}
