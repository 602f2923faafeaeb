"""``--help`` of every configuration: its examples compose, and its choices and settings have a line each."""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from recipes import generate
from recipes.common.cli import compose_config
from recipes.common.help import help_of
from recipes.common.overrides import CONFIGS, as_overrides, choices, experiments_of

RECIPES = sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "recipe")  # recipe.yaml holds Hydra's own
BENCHES = sorted(f"bench/{file.stem}" for file in (CONFIGS / "bench").glob("*.yaml"))
EVERY = [*RECIPES, *BENCHES]
# Settings whose names are the user's or another library's; the comment of the mapping describes them.
OPEN_MAPPINGS = ("model.config", "eval.limits")
CONFIG_OF_MODULE = {"eval.run": "evaluate", "eval.speed": "eval_speed", "slurm.submit": "submit"}


def chosen_groups(name: str) -> dict[str, str]:
    """Return each configuration group of ``name`` with its default choice, as Hydra resolves them."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        composition = hydra.compose(name, return_hydra_config=True)
    groups = composition.hydra.runtime.choices
    return {group: choice for group, choice in groups.items() if not group.startswith("hydra/")}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings; lists and `OPEN_MAPPINGS` are one setting each."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in OPEN_MAPPINGS:
            yield from leaves(value, f"{name}.")
        else:
            yield name


def comments_in_help(text: str) -> dict[str, str]:
    """Return the comment of each setting in a help text, by dotted name; a repeated setting keeps its first comment."""
    comments: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in text.partition("Settings, as key=value:\n")[2].splitlines():
        match = re.match(r"(?P<indent> *)(?P<key>[\w.]+):(?P<rest>.*)$", line)
        if not match:
            continue
        parents = [parent for parent in parents if parent[0] < len(match["indent"])]
        parents.append((len(match["indent"]), match["key"]))
        name, comment = ".".join(key for _, key in parents), match["rest"].partition("# ")[2].strip()
        comments[name] = comments.get(name) or comment
    return comments


def examples(name: str) -> list[tuple[str, list[str]]]:
    """Return the module and the words of each ``python -m`` and ``torchrun`` example in the help of ``name``."""
    lines = [line.strip() for line in help_of(name).splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if re.match(r"(python|torchrun) .*-m ", line)]
    after_m = [command[command.index("-m") + 1 :] for command in commands]
    return [(module, words) for module, *words in after_m]


@pytest.mark.parametrize("name", EVERY)
def test_help_begins_with_a_description_and_examples(name):
    text = help_of(name)
    description, _, rest = text.partition("Examples:\n")
    assert description.strip() and "Settings, as key=value:" in rest
    assert examples(name), "no example"
    assert "$" not in re.sub(r"\$\{oc\.env:\w+", "", text), "a variable of Hydra's own help is left"


@pytest.mark.parametrize("name", EVERY)
def test_help_has_a_line_for_every_choice(name):
    text = help_of(name)
    for group, default in chosen_groups(name).items():
        for choice in experiments_of(name) if group == "experiment" else choices(group):
            match = re.search(rf"^  ([ *]) {re.escape(f'{group}={choice}')} +(\S.*)$", text, re.MULTILINE)
            assert match, f"{group}={choice} has no line that describes it"
            assert (match[1] == "*") == (choice == default), f"{group}={choice}: the default is {default}"
    assert "=_" not in text.partition("Settings, as key=value:")[0].partition("Choices, as group=name")[2], "a base"


@pytest.mark.parametrize("name", EVERY)
def test_help_has_a_comment_for_every_setting(name):
    settings = OmegaConf.to_container(compose_config(name, []), resolve=False)
    comments = comments_in_help(help_of(name))
    assert not [setting for setting in leaves(settings) if not comments.get(setting)]


@pytest.mark.parametrize("name", EVERY)
def test_every_example_composes(name):
    """Each example gives all required settings, and Hydra accepts every word."""
    for module, words in examples(name):
        if module == "slurm.submit":
            check_submission(words)
        elif module == "recipes.bench":
            check_composes(f"bench/{words[0]}", words[1:])
        else:
            check_composes(CONFIG_OF_MODULE.get(module, module.removeprefix("recipes.")), words)


def check_composes(config_name: str, words: list[str]) -> None:
    """Fail unless ``words`` compose with the configuration, name no old setting, and set all required ones."""
    overrides = as_overrides(config_name, words, lambda line: pytest.fail(f"{words}: {line}"))
    OmegaConf.to_container(compose_config(config_name, overrides), resolve=True, throw_on_missing=True)


def check_submission(words: list[str]) -> None:
    """Fail unless slurm.submit accepts its settings in ``words``, and the recipe each run of the others."""
    from slurm.settings import read_settings, split_words

    own, others = split_words(words)
    settings, _ = read_settings(own)
    if settings.recipe:
        check_composes("submit", own)
        name = {"eval": "evaluate"}.get(settings.recipe, settings.recipe)
        # A sweep lists a setting's values; a submission without ``out`` gets one.
        has_out = "out" not in set(compose_config(name, [])) or any(word.startswith("out=") for word in others)
        default_out = [] if has_out else ["out=a"]
        for run in itertools.product(*map(expand_sweep, others)):
            check_composes(name, [*run, *default_out])


def expand_sweep(word: str) -> list[str]:
    """Return a sweep's word of each run: ``a=1,2`` gives ``a=1`` and ``a=2``; a list in brackets is one value."""
    key, _, values = word.partition("=")
    return [f"{key}={value}" for value in values.split(",")] if not set("[{'\"") & set(values) else [word]


def test_asking_for_help_does_not_run_the_recipe(cli):
    for word in ("--help", "-h"):
        code, out, err = cli(generate, lambda _: pytest.fail("the recipe ran"), "mesh.ring=2", word)
        assert (code, out, err) == (0, help_of("generate") + "\n", "")


def test_help_of_training_says_how_a_source_is_written():
    assert "# Text and how it is packed. A source is one of\n" in help_of("pretrain")


def test_recipe_without_groups_lists_none():
    assert "Choices" not in help_of("export") and "Choices" in help_of("pretrain")
