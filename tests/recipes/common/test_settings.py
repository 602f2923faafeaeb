"""Rules for all settings: what is mandatory is asked for, and a number is finite and was given as a number."""

import re
from dataclasses import fields
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from eval.settings import EvalConfig
from longctx import config as sections
from longctx.config import DataSettings, ModelSource, Optim, Sampling
from recipes import calibrate, export, extend, generate, pretrain, spd_adapt, spd_sensitivity
from recipes.bench import spd_quality, spd_sweep
from recipes.common import settings
from recipes.common.spd_plan import SPD
from recipes.serve import PrefixSettings
from recipes.spd_sensitivity import SensitivityThresholds

FOLDER = {"name": "a", "source": "b"}
KINDS = {
    Optim: {}, Sampling: {}, SPD: {}, sections.Repair: {}, sections.JointRepair: {}, ModelSource: FOLDER,
    EvalConfig: {}, SensitivityThresholds: {}, sections.TextSource: {"path": "a"},
    sections.LoRA: {}, PrefixSettings: {},
}  # fmt: skip


def has_float(hints):
    """Return True if a type is, or has, float; a literal such as "float32" is a name."""
    return bool(re.search(r"\bfloat\b", str(hints)))


FLOATS = [(kind, field.name) for kind in KINDS for field in fields(kind) if has_float(get_type_hints(kind)[field.name])]


def read(kind, **values):
    return settings.section(OmegaConf.create({"group": values}), "group", kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "nan", "Infinity"], ids=str)
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda value: value if isinstance(value, str) else "")
def test_infinite_numbers_are_refused_in_every_float_setting(kind, name, value):
    given = [0.9, value] if name == "betas" else value
    with pytest.raises(ValueError, match=name):
        read(kind, **KINDS[kind], **{name: given})


def test_all_sections_with_float_settings_are_tested():
    with_floats = {
        kind for kind in map(sections.__dict__.get, sections.__all__)
        if hasattr(kind, "__dataclass_fields__") and has_float(get_type_hints(kind))
    }  # fmt: skip
    assert len(FLOATS) > 15 and with_floats <= {kind for kind, _ in FLOATS}


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (generate.GenerateSettings, {"max_new_tokens": True}, "group.max_new_tokens=true: use a number"),
        (Optim, {"lr": True}, "group.lr=true: use a number"),
        (Optim, {"betas": [0.5, False]}, r"group.betas.1=false: use a number"),
        (ModelSource, FOLDER | {"max_positions": True}, "group.max_positions=true: use a number"),
        (DataSettings, {"sources": [{"path": "a", "weight": True}]}, "group.sources.0.weight=true: use a number"),
        (EvalConfig, {"limits": {"arc_easy": True}}, "group.limits.arc_easy=true: use a number"),
        (ModelSource, {"name": "a", "tokenizer": "bytes", "config": {"rope_theta": float("nan")}},
         "group.config.rope_theta=nan: use a finite number"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_switch_or_nan_in_place_of_a_number_is_refused(kind, values, words):
    with pytest.raises(ValueError, match=words):
        read(kind, **values)
    assert read(generate.GenerateSettings, verify=True).verify is True


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Optim, {"decay": "constant", "decay_steps": 100}, "decay_steps=100 is not used by optim.decay=constant"),
        (Sampling, {"top_p": 0.5}, "top_p=0.5 has no effect at sampling.temperature=0"),
        (ModelSource, FOLDER | {"wheel": "w"}, "set either model.source, or model.wheel"),
        (ModelSource, FOLDER | {"tokenizer": "bytes"}, "set either model.source, or model.wheel"),
    ],
)
def test_setting_without_a_use_is_refused(kind, values, words):
    with pytest.raises(ValueError, match=words):
        read(kind, **values)


def test_constant_rate_may_be_below_the_default_final_rate():
    assert read(Optim, decay="constant", lr=1e-5).final_lr == 1e-5
    assert read(Optim, decay="linear", lr=1e-3, min_lr=1e-5).final_lr == 1e-5
    with pytest.raises(ValueError, match=r"optim\.lr=-1\.0: use 0 or more"):
        read(Optim, decay="constant", lr=-1.0)


MANDATORY = {
    "calibrate": (calibrate, "out"), "export": (export, "checkpoint"), "extend": (extend, "out"),
    "pretrain": (pretrain, "out"), "spd_adapt": (spd_adapt, "out"), "spd_sensitivity": (spd_sensitivity, "out"),
    "bench/spd_quality": (spd_quality, "sensitivity"), "bench/spd_sweep": (spd_sweep, "out"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "missing"), MANDATORY.values(), ids=MANDATORY)
def test_mandatory_setting_is_asked_for_before_anything_starts(refused, recipe, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{missing} is not given: add {missing}=" in refused(recipe, recipe.task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "word"),
    [("pretrain", "out="), ("generate", "out="), ("generate", "prompt.file="), ("chat", "session.save="),
     ("evaluate", "adapted="), ("evaluate", "model.cache="), ("bench/crossover", "picture="), ("export", "to=")],
)  # fmt: skip
def test_empty_path_is_refused(config_of, name, word):
    """``out=$UNSET`` would be the working folder."""
    config = config_of(name, word)
    section, _, key = word.rstrip("=").rpartition(".")
    values = OmegaConf.to_container(config[section] if section else config)
    with pytest.raises(ValueError, match=rf"{word} is empty: give {word}PATH"):
        settings._refuse_unset(word.rstrip("="), values[key])
