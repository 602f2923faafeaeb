"""Old names of settings, accepted for one release: each use prints one line that gives the new name."""

from collections.abc import Callable, Mapping
from typing import Any

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


def rename_override(word: str, say: Say) -> str:
    """``word``, a ``key=value`` of the command line, with the key and value that are in use now."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    prefix, bare = ("++", key[2:]) if key.startswith("++") else ("", key)
    prefix, bare = (key[0], key[1:]) if not prefix and key[:1] in "+~" else (prefix, bare)
    name, new_value = SETTINGS.get(bare, bare), VALUES.get(bare, {}).get(value, value)
    if (name, new_value) != (bare, value):
        say(f"{bare}={value} is an old name: use {name}={new_value}")
    return f"{prefix}{name}={new_value}"


def rename_settings(config: DictConfig, say: Say) -> DictConfig:
    """``config`` with old names, such as those of a user's own experiment file, replaced in place."""
    with open_dict(config):
        for old, new in SETTINGS.items():
            if OmegaConf.select(config, old, throw_on_missing=False) is None:
                continue
            section, _, key = old.rpartition(".")
            holder = OmegaConf.select(config, section) if section else config
            value = holder.pop(key)
            say(f"{old}={value} is an old name: use {new}={value}")
            OmegaConf.update(config, new, value)
        for name, values in VALUES.items():
            value = OmegaConf.select(config, name, throw_on_missing=False)
            if isinstance(value, str) and value in values:
                say(f"{name}={value} is an old name: use {name}={values[value]}")
                OmegaConf.update(config, name, values[value])
    return config


def rename_flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of a saved manifest or result, by dotted name, with the names and values that are in use now."""
    renamed = {}
    for name, value in values.items():
        old_values = {**VALUES, "decode_strategy": VALUES["context.decode"]}.get(name, {})
        renamed[SETTINGS.get(name, name)] = old_values.get(value, value) if isinstance(value, str) else value
    return renamed


def rename_item(setting: str, item: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """``item`` of the list ``setting`` (``variants``, ``texts``, ``models``) with the names that are in use now."""
    renamed: dict[str, Any] = {}
    for key, value in item.items():
        name = ITEMS.get(setting, {}).get(key, key)
        if name != key:
            say(f"{setting}: {key} is an old name: use {name}")
        renamed[name] = value
    nested = OmegaConf.create({key: value for key, value in renamed.items() if isinstance(value, Mapping)})
    plain: Any = OmegaConf.to_container(rename_settings(nested, say))
    return renamed | plain
