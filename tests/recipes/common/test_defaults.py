"""Defaults have one source: the values in the YAML files of configs/ equal the defaults of the dataclasses."""

from dataclasses import MISSING, Field, fields
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
    Reduce,
    Repair,
    Run,
    Sampling,
    Track,
)
from recipes.common.overrides import CONFIGS

# File -> dataclass: the default choice of each group.
GROUPS = {
    "context/pass_kv": Context,
    "data/_base": DataSettings,
    "launcher/slurm": "slurm.settings.Launcher",
    "mesh/one_rank": Mesh,
    "model/_base": ModelSource,
    "optim/adamw": Optim,
    "reduce/float32": Reduce,
    "run/local": Run,
    "sampling/greedy": Sampling,
    "spd/saved": SPD,
    "track/none": Track,
    "work/prefill": "recipes.common.plan_question.WorkSettings",
}
# File -> dataclass of its settings outside any section.
TOP_LEVEL = {
    "bench/attention": "recipes.bench.attention.AttentionSettings",
    "bench/convergence": "recipes.bench.convergence.ConvergenceSettings",
    "bench/crossover": "recipes.bench.crossover.CrossoverSettings",
    "bench/decode": "recipes.bench.decode.DecodeSettings",
    "bench/drift": "recipes.bench.drift.DriftSettings",
    "bench/gpu_check": "recipes.bench.gpu_check.GpuCheckSettings",
    "bench/memory": "recipes.bench.memory.MemoryBenchSettings",
    "bench/million": "recipes.bench.million.MillionSettings",
    "bench/output_norms": "recipes.bench.output_norms.OutputNormsSettings",
    "bench/prefill": "recipes.bench.prefill.PrefillSettings",
    "bench/rivals": "recipes.bench.rivals.RivalSettings",
    "bench/serve": "recipes.bench.serve.ServeBenchSettings",
    "bench/spd_latency": "recipes.bench.spd_latency.LatencySettings",
    "bench/spd_quality": "recipes.bench.spd_quality.QualitySettings",
    "bench/spd_sweep": "recipes.bench.spd_sweep.SweepSettings",
    "bench/spd_texts": "recipes.bench.spd_texts.TextsSettings",
    "bench/spd_tradeoff": "recipes.bench.spd_tradeoff.TradeoffSettings",
    "bench/times": "recipes.bench.times.TimesSettings",
    "bench/train": "recipes.bench.train.TrainBenchSettings",
    "calibrate": "recipes.calibrate.CalibrateSettings",
    "chat": "recipes.chat.ChatSettings",
    "doctor": "recipes.doctor.DoctorSettings",
    "evaluate": "eval.settings.EvalSettings",
    "export": "recipes.export.ExportSettings",
    "generate": "recipes.generate.GenerateSettings",
    "models": "recipes.models.ModelsSettings",
    "plan": "recipes.plan.PlanSettings",
    "pretrain": "recipes.common.train_job.TrainSettings",
    "serve": "recipes.serve.ServeSettings",
    "spd_sensitivity": "recipes.spd_sensitivity.SensitivitySettings",
    "submit": "slurm.settings.SubmitSettings",
}
# File and section -> dataclass.
SECTIONS = {
    ("chat", "session"): "recipes.chat.SessionPaths",
    ("eval_speed", "speed"): "eval.speed.SpeedSettings",
    ("evaluate", "eval"): "eval.settings.EvalConfig",
    ("generate", "prompt"): PromptSource,
    ("pretrain", "evaluate"): "recipes.common.train_job.Evaluation",
    ("pretrain", "checkpoint"): "recipes.common.train_job.Saving",
    ("serve", "cache"): "recipes.serve.PrefixSettings",
    ("spd_adapt", "repair"): Repair,
    ("spd_adapt", "joint"): JointRepair,
    ("spd_sensitivity", "classes"): "recipes.spd_sensitivity.SensitivityThresholds",
}
# Settings that the choices of a group set, not its base: every model has a source, every text its files.
SET_BY_CHOICES = {
    "model/_base": {"name", "source", "wheel", "gguf", "sha256", "config", "tokenizer"},
    "data/_base": {"sources"},
}
FROM_ENVIRONMENT = {("model/_base", "cache"), ("evaluate", "data")}  # ${oc.env:...}
# Configurations that change values of another one: their own values are not defaults.
EXTENDING = {"eval_speed", "extend", "finetune", "spd_adapt"}
HYDRA_ONLY = {"recipe"}


def read(name):
    """Return the settings in a file of configs/, without the defaults list and Hydra's own section."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def import_class(kind):
    """Return the class ``kind``, which may be a dotted name."""
    if not isinstance(kind, str):
        return kind
    module, _, attribute = kind.rpartition(".")
    return getattr(import_module(module), attribute)


def default_of(field: Field):
    """Return the default of a dataclass' field as the YAML writes it; ``???`` for a required field."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    value = list(value) if isinstance(value, tuple) else value
    return "???" if value is MISSING else value


def differences(name, values, kind):
    """Return a line for each field of ``kind`` whose YAML value differs from its default, or is missing."""
    kind, lines = import_class(kind), []
    exempt = SET_BY_CHOICES.get(name, set())
    for field in fields(kind):
        if field.name in exempt or (name, field.name) in FROM_ENVIRONMENT:
            continue
        default, value = default_of(field), values.get(field.name, "???")
        if isinstance(default, float) and isinstance(value, str | int):
            value = float(value)  # YAML reads 1e-3 as text
        if value != default:
            lines.append(f"{name}: {field.name} is {value} in the YAML, {default} in {kind.__name__}")
    return lines


@pytest.mark.parametrize(("name", "kind"), GROUPS.items(), ids=GROUPS)
def test_group_has_the_defaults_of_its_dataclass(name, kind):
    assert not differences(name, read(name), kind)


@pytest.mark.parametrize("name", SET_BY_CHOICES)
def test_choices_set_what_the_base_leaves_out(name):
    """A field is exempt only if it exists and some choice of the group sets it."""
    group = name.partition("/")[0]
    choices = [read(f"{group}/{file.stem}") for file in (CONFIGS / group).glob("[!_]*.yaml")]
    assert {field.name for field in fields(GROUPS[name])} >= SET_BY_CHOICES[name]
    for field in SET_BY_CHOICES[name]:
        assert any(field in choice for choice in choices), field


@pytest.mark.parametrize(("name", "kind"), TOP_LEVEL.items(), ids=TOP_LEVEL)
def test_recipe_has_the_defaults_of_its_dataclass(name, kind):
    assert not differences(name, read(name), kind)


@pytest.mark.parametrize(("place", "kind"), SECTIONS.items(), ids=[".".join(place) for place in SECTIONS])
def test_section_has_the_defaults_of_its_dataclass(place, kind):
    name, section = place
    assert not differences(name, read(name)[section], kind)


def test_every_configuration_is_compared():
    recipes = {file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.glob("*.yaml")}
    benches = {f"bench/{file.stem}" for file in (CONFIGS / "bench").glob("*.yaml")}
    assert recipes | benches == {*TOP_LEVEL} | EXTENDING | HYDRA_ONLY
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"bench", "experiment", "machine"}
    assert groups == {name.partition("/")[0] for name in GROUPS}
