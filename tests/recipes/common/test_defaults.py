"""Defaults have one source: what the YAML files of configs/ show equals the defaults of the dataclasses."""

from dataclasses import MISSING, fields
from importlib import import_module

import pytest
import yaml

from longctx.config import (
    SPD,
    Context,
    DataSettings,
    JointRepair,
    Mesh,
    ModelSource,
    Optim,
    PromptSource,
    Repair,
    Run,
    Sampling,
    Track,
)
from recipes.common.overrides import CONFIGS

GROUPS = {
    "context/pass_kv": Context,
    "data/_base": DataSettings,
    "mesh/one_rank": Mesh,
    "model/_base": ModelSource,
    "optim/adamw": Optim,
    "run/local": Run,
    "sampling/greedy": Sampling,
    "spd/saved": SPD,
    "track/none": Track,
}
TOP_LEVEL = {
    "bench/crossover": "recipes.bench.crossover.CrossoverSettings",
    "bench/decode": "recipes.bench.decode.DecodeSettings",
    "bench/drift": "recipes.bench.drift.DriftSettings",
    "bench/million": "recipes.bench.million.MillionSettings",
    "bench/prefill": "recipes.bench.prefill.PrefillSettings",
    "bench/spd_latency": "recipes.bench.spd_latency.LatencySettings",
    "calibrate": "recipes.calibrate.CalibrateSettings",
    "chat": "recipes.chat.ChatSettings",
    "evaluate": "eval.job.EvalSettings",
    "export": "recipes.export.ExportSettings",
    "generate": "recipes.generate.GenerateSettings",
    "pretrain": "recipes.common.train_job.TrainSettings",
    "submit": "slurm.settings.SubmitSettings",
}
SECTIONS = {
    ("chat", "session"): "recipes.chat.SessionPaths",
    ("evaluate", "eval"): "eval.job.EvalConfig",
    ("generate", "prompt"): PromptSource,
    ("pretrain", "evaluate"): "recipes.common.train_job.Evaluation",
    ("pretrain", "checkpoint"): "recipes.common.train_job.Saving",
    ("spd_adapt", "repair"): Repair,
    ("spd_adapt", "joint"): JointRepair,
    ("spd_sensitivity", "classes"): "recipes.spd_sensitivity.SensitivityThresholds",
}
FROM_ENVIRONMENT = {("model/_base", "cache"), ("evaluate", "data")}  # ${oc.env:...}


def read(name):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def differences(name, values, kind):
    """Settings whose YAML value is not the dataclass' default; a required setting has none, and ``???`` or nothing."""
    if isinstance(kind, str):
        module, _, attribute = kind.rpartition(".")
        kind = getattr(import_module(module), attribute)
    off = []
    for field in fields(kind):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = values.get(field.name, "???")
        if (name, field.name) in FROM_ENVIRONMENT:
            continue
        expected = "???" if default is MISSING else default
        expected = list(expected) if isinstance(expected, tuple) else expected
        number = isinstance(expected, int | float) and not isinstance(expected, bool)
        if (float(shown) if number and shown != "???" else shown) != expected:
            off.append(f"{name}: {field.name} is {shown} in the YAML, {expected} in {kind.__name__}")
    return off


@pytest.mark.parametrize(("name", "kind"), GROUPS.items(), ids=GROUPS)
def test_groups(name, kind):
    values, required = (
        read(name),
        {"model/_base": {"name", "source"}, "data/_base": {"sources", "length"}}.get(name, set()),
    )
    off = differences(name, values, kind)
    assert not [line for line in off if not any(f": {field} is" in line for field in set_by_choices.get(name, ()))], off


@pytest.mark.parametrize(("name", "kind"), TOP_LEVEL.items(), ids=TOP_LEVEL)
def test_settings_outside_sections(name, kind):
    assert not differences(name, read(name), kind)


@pytest.mark.parametrize(("place", "kind"), SECTIONS.items(), ids=[".".join(place) for place in SECTIONS])
def test_sections_of_a_recipe(place, kind):
    name, section = place
    assert not differences(name, read(name)[section], kind)
