"""Mistakes on the command line: each is one line with the setting and what to write instead."""

from dataclasses import dataclass
from typing import Literal

import pytest
from omegaconf import OmegaConf
from pydantic import PositiveInt

from recipes.common.cli import compose_config
from recipes.common.mistakes import is_readable
from recipes.common.overrides import as_overrides
from recipes.common.settings import section


def refusal(word: str, recipe: str = "pretrain") -> str:
    with pytest.raises(ValueError, match=r"\w") as refused:
        compose_config(recipe, as_overrides(recipe, ["out=x", word], pytest.fail))
    return str(refused.value)


@pytest.mark.parametrize(
    "text", ["~/x", "a(1).txt", "a[1]", "a=b", "a,b", "bücher/", "x}y", "train[:10%]"], ids=lambda text: text
)
@pytest.mark.parametrize("key", ["path", "split"])
def test_text_of_a_source_that_needs_quotes_is_shown_with_them(key, text):
    source = {"path": f"{{{key}:{text}}}", "split": f"{{name:org/x,{key}:{text},weight:2}}"}[key]
    line = refusal(f"data.sources=[{source},{{pydoc:train}}]")
    advised = line.partition('in a shell, write "')[2].removesuffix('"')
    config = compose_config("pretrain", as_overrides("pretrain", ["out=x", advised], pytest.fail))
    assert config.data.sources[0][key] == text and config.data.sources[1] == {"pydoc": "train"}


@pytest.mark.parametrize("word", ["track.tags=[a,é]", "eval.gate=[x", "mesh.ring=(", "launcher.qos=a=b"])
def test_other_text_that_needs_quotes_is_refused_with_the_form(word):
    assert not is_readable(word)
    assert f"{word} cannot be read: quote the text" in refusal(word)


_NO_FIELD, _ANOTHER = "the model's file has no model.config", "another field of config.json, write +model.config"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mesh.rong=2", "there is no setting mesh.rong: did you mean mesh.ring?"),
        ("data.source=[]", "there is no setting data.source: did you mean data.sources?"),
        ("ring=2", "there is no setting ring: did you mean mesh.ring?"),
        ("model.config.rms_norm_eps=1", f"{_NO_FIELD}.rms_norm_eps: for {_ANOTHER}.rms_norm_eps=VALUE"),
        (
            "model.config.hiden_size=8",
            f"{_NO_FIELD}.hiden_size: did you mean model.config.hidden_size? For {_ANOTHER}.hiden_size=VALUE",
        ),
        ("mesh.qqqq=2", "there is no setting mesh.qqqq: --help lists the settings"),
        ("nonsense=2", "there is no setting nonsense: --help lists the settings"),
        ("mesh.ring", "mesh.ring is not a setting: write KEY=VALUE, such as mesh.ring=2"),
        ("data=nowhere", "data=nowhere is unknown: use pydoc, text"),
        ("data=_base", "data=_base only holds defaults for the other choices: use pydoc, text"),
    ],
)
def test_misspelt_setting_is_refused_with_the_nearest(word, message):
    assert refusal(word) == message


def test_unlisted_field_of_config_is_advised_only_where_it_is_accepted(config_of):
    assert config_of("pretrain", "out=x", "+model.config.rms_norm_eps=1e-5").model.config.rms_norm_eps == 1e-5
    with pytest.raises(ValueError, match=r"no setting model.config.hidden_size: this model has weights.*leave it out"):
        config_of("generate", "prompt.text=a", "model.config.hidden_size=8")


@dataclass(frozen=True)
class _Part:
    kinds: tuple[Literal["ISB", "SB"], ...] = ()
    kind: Literal["ISB", "SB"] = "SB"
    size: PositiveInt | None = None
    after: PositiveInt | tuple[PositiveInt, ...] | None = None
    betas: tuple[float, float] = (0.5, 0.5)
    name: str | None = None
    on: bool = False


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kinds", ["isb"], "part.kinds.0=isb: give ISB or SB"),
        ("kinds", "ISB", "part.kinds=ISB: give a list: [...]"),
        ("kind", ["SB"], "part.kind=['SB']: give ISB or SB (one of them, without brackets)"),
        ("size", "x", "part.size=x: give a whole number"),
        ("size", 0, "part.size=0: give a number greater than 0"),
        ("after", "x", "part.after=x: give a whole number or a list: [...]"),
        ("betas", [0.5], "part.betas.1 is missing: give a value"),
        ("name", 7, "part.name=7: give text; a number or true as text is written in quotes"),
        ("on", "maybe", "part.on=maybe: give true or false"),
        ("name1", "x", "there is no setting part.name1: did you mean part.name?"),
    ],
)
def test_wrong_value_is_refused_in_the_words_of_a_command_line(key, value, message):
    with pytest.raises(ValueError, match=r"\w") as refused:
        section(OmegaConf.create({"part": {key: value}}), "part", _Part)
    assert str(refused.value) == message
