"""Old names of settings work wherever they can be written, and each prints one line with the new name."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from recipes import generate
from recipes.common import renamed
from recipes.common.settings import sections

OLD_VALUES = [(name, old, new) for name, values in renamed.VALUES.items() for old, new in values.items()]
OLD_ITEM_KEYS = [(setting, old, new) for setting, keys in renamed.ITEMS.items() for old, new in keys.items()]


@pytest.fixture
def lines():
    """The printed lines: pass ``lines.append`` as ``say``."""
    return []


def nested(name, value):
    """Return ``{"a": {"b": value}}`` for the dotted name ``a.b``."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def without_empty_sections(config):
    """Return the plain values of ``config`` without the sections that renaming has emptied."""
    return {key: value for key, value in OmegaConf.to_container(config).items() if value != {}}


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(("old", "new"), renamed.SETTINGS.items())
def test_old_name_on_the_command_line(lines, old, new, prefix):
    assert renamed.rename_override(f"{prefix}{old}=3", lines.append) == f"{prefix}{new}=3"
    assert lines == [f"{old}=3 is an old name: use {new}=3"]


@pytest.mark.parametrize(("name", "old", "new"), OLD_VALUES)
def test_old_value_on_the_command_line(lines, name, old, new):
    assert renamed.rename_override(f"{name}={old}", lines.append) == f"{name}={new}"
    assert lines == [f"{name}={old} is an old name: use {name}={new}"]


@pytest.mark.parametrize(
    "word", ["run.threads=3", "prompt.text=threads=3", "context.decode=pass_q", "--multirun", "~x"]
)
def test_current_words_are_unchanged(lines, word):
    assert (renamed.rename_override(word, lines.append), lines) == (word, [])


@pytest.mark.parametrize("value", [3, None])
@pytest.mark.parametrize(("old", "new"), renamed.SETTINGS.items())
def test_old_name_in_a_config(lines, old, new, value):
    """The config is a struct, as Hydra composes it, and has the new name with its default."""
    config = OmegaConf.merge(nested(old, value), nested(new, 7))
    OmegaConf.set_struct(config, True)
    config = renamed.rename_settings(config, lines.append)
    assert without_empty_sections(config) == nested(new, value)
    shown = "null" if value is None else value
    assert lines == [f"{old}={shown} is an old name: use {new}={shown}"]


@pytest.mark.parametrize(("name", "old", "new"), OLD_VALUES)
def test_old_value_in_a_config(lines, name, old, new):
    config = renamed.rename_settings(OmegaConf.create(nested(name, old)), lines.append)
    assert OmegaConf.to_container(config) == nested(name, new)
    assert lines == [f"{name}={old} is an old name: use {name}={new}"]


def test_current_config_is_unchanged(lines):
    values = {
        "out": "???",
        "model": {"max_positions": None},
        "context": {"decode": "pass_q"},
        "eval": {"max_length": 5},
    }
    config = renamed.rename_settings(OmegaConf.create(values), lines.append)
    assert (OmegaConf.to_container(config), lines) == (values, [])


@pytest.mark.parametrize(("setting", "old", "new"), OLD_ITEM_KEYS)
def test_old_key_of_a_list_item(lines, setting, old, new):
    assert renamed.rename_item(setting, {old: "a", "folder": "b"}, lines.append) == {new: "a", "folder": "b"}
    assert lines == [f"{setting}: {old} is an old name: use {new}"]


SECTIONS_OF_ITEMS = [pair for pair in renamed.SETTINGS.items() if "." in pair[0]]


@pytest.mark.parametrize(("old", "new"), SECTIONS_OF_ITEMS)
def test_old_name_in_a_section_of_a_list_item(lines, old, new):
    assert renamed.rename_item("variants", {"name": "a", **nested(old, 3)}, lines.append) == {
        "name": "a",
        **nested(new, 3),
    }
    assert lines == [f"{old}=3 is an old name: use {new}=3"]


def test_old_value_in_a_section_of_a_list_item(lines):
    item = {"name": "a", "context": {"decode": "one_exchange"}}
    assert renamed.rename_item("variants", item, lines.append) == {"name": "a", "context": {"decode": "gather_merge"}}
    assert lines == ["context.decode=one_exchange is an old name: use context.decode=gather_merge"]


@dataclass(frozen=True)
class Labelled:
    """An item of ``models``, for `sections`."""

    label: str


def test_sections_print_old_keys_of_items(lines):
    config = OmegaConf.create({"models": [{"called": "a"}, {"label": "b"}]})
    assert sections(config, "models", Labelled, lines.append) == (Labelled("a"), Labelled("b"))
    assert lines == ["models: called is an old name: use label"]


@pytest.mark.parametrize(("old", "new"), renamed.SETTINGS.items())
def test_old_name_among_saved_values(old, new):
    assert renamed.rename_flat({old: 3, "seed": 5}) == {new: 3, "seed": 5}


@pytest.mark.parametrize(("name", "old", "new"), [*OLD_VALUES, ("decode_strategy", "one_exchange", "gather_merge")])
def test_old_value_among_saved_values(name, old, new):
    """A result has the decode strategy under another name than the settings."""
    assert renamed.rename_flat({name: old}) == {name: new}
    assert renamed.rename_flat({name: [old]}) == {name: [old]}, "a list of that name is no old value"


@pytest.mark.parametrize(("setting", "old", "new"), OLD_ITEM_KEYS)
def test_old_key_of_a_list_item_among_saved_values(setting, old, new):
    saved = {f"{setting}.0.{old}": "a", f"{setting}.12.{old}": "b", f"turns.0.{old}": "c"}
    assert renamed.rename_flat(saved) == {f"{setting}.0.{new}": "a", f"{setting}.12.{new}": "b", f"turns.0.{old}": "c"}


def test_old_names_in_sections_of_list_items_among_saved_values():
    saved = {"variants.1.context.decode": "one_exchange", "variants.1.eval.longest": 3, "turns.0.text": "tiny"}
    current = {"variants.1.context.decode": "gather_merge", "variants.1.eval.max_length": 3, "turns.0.text": "tiny"}
    assert renamed.rename_flat(saved) == current


def test_recipe_accepts_old_names_and_prints_each_once(cli):
    """The same names from the command line on: the task gets the new settings, standard error the lines."""
    configs = []
    words = ("experiment=demo", "threads=1", "context.decode=one_exchange", "model.positions=500")
    code, out, err = cli(generate, configs.append, *words)
    assert (code, out) == (0, "")
    (config,) = configs
    assert (config.run.threads, config.context.decode, config.model.max_positions) == (1, "gather_merge", 500)
    assert config.prompt.tokens == 6000
    assert sorted(err.splitlines()) == [
        "context.decode=one_exchange is an old name: use context.decode=gather_merge",
        "experiment=demo is an old name: use experiment=generate/demo",
        "model.positions=500 is an old name: use model.max_positions=500",
        "threads=1 is an old name: use run.threads=1",
    ]
