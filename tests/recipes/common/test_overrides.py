"""Words of a command line become Hydra overrides: sweeps of paths, quoted names, choices that fit the recipe."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipes import chat, export, generate, pretrain
from recipes.common.overrides import (
    CONFIGS,
    as_overrides,
    choices,
    expand_home,
    experiments_of,
    path_word,
    typed_word,
)
from recipes.common.settings import as_config, as_dict

GROUPS_WITH_BASES = sorted({file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("_*.yaml")})


@pytest.fixture
def runs(cli, tmp_path, monkeypatch):
    """``runs(*argv)``: the configurations of the runs that ``python -m recipes.generate argv`` makes."""
    monkeypatch.chdir(tmp_path)  # Hydra's records of a sweep are relative to the current folder

    def runs(*argv):
        configs = []
        code, _, err = cli(generate, configs.append, *argv)
        assert code == 0, err
        return configs

    return runs


@pytest.mark.parametrize("switch", ["--multirun", "-m"])
def test_listed_outs_are_the_outs_of_a_sweep(runs, switch):
    assert [config.out for config in runs(switch, "out=a.json,b c/d.json")] == ["a.json", "b c/d.json"]


def test_one_out_of_a_sweep_is_numbered(runs):
    configs = runs("--multirun", "out=a", "sampling.seed=3,5")
    assert [(config.out, config.sampling.seed) for config in configs] == [("a/0", 3), ("a/1", 5)]
    configs = runs("--multirun", "out=a/x.json", "sampling.seed=3,5")
    assert [config.out for config in configs] == ["a/0/x.json", "a/1/x.json"]


def test_sweep_of_outs_and_another_setting_makes_every_pair(runs):
    configs = runs("--multirun", "out=a,b", "sampling.seed=3,5")
    assert {(config.out, config.sampling.seed) for config in configs} == {("a", 3), ("a", 5), ("b", 3), ("b", 5)}


def test_one_run_keeps_its_out(runs):
    assert [config.out for config in runs("out=a")] == ["a"]


def test_listed_outs_without_multirun_are_refused_with_the_fix(refused):
    line = refused(generate, generate.task, "out=a,b", "prompt.text=hello")
    assert "out=a,b lists several values: add --multirun for a sweep, or quote it: out='\"a,b\"'" in line


@pytest.mark.parametrize(
    ("word", "advice"), [("~mesh.ring", "delete this word"), ("+=3", "write KEY=VALUE"), ("=3", "write KEY=VALUE")]
)
def test_a_word_that_sets_nothing_is_refused_with_the_fix(refused, word, advice):
    assert f"{word} is not a setting: {advice}" in refused(generate, generate.task, word, "prompt.text=hello")


def test_the_advised_quoting_gives_that_name(runs):
    """A shell passes ``out='"a,b"'`` as the word ``out="a,b"``."""
    assert [config.out for config in runs('out="a,b"')] == ["a,b"]


def test_a_quoted_comma_is_a_name_in_a_sweep_too(runs):
    configs = runs("--multirun", 'out="a,b"', "sampling.seed=3,5")
    assert [config.out for config in configs] == ["a,b/0", "a,b/1"]


@pytest.mark.parametrize("name", ["a b", "it's", "a=b", "[x]", "{y}", "(z)", "$HOME", "${x}"])
def test_paths_with_special_characters_are_unchanged(runs, name):
    assert [config.out for config in runs(f"out={name}")] == [name]


PIECES = ["${", "\\${", "a.b}", *"'\"\\$,:=[](){}~ \n#é"]


@given(text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join))
@example(text='"Yes," he said, "no."')
@example(text='"Yes"')
@example(text="echo \\${HOME}")
@example(text="ends in \\")
def test_free_text_is_read_as_typed_and_typed_again_the_same(text):
    (override,) = as_overrides("generate", [f"prompt.text={text}"], print)
    parsed = OverridesParser.create().parse_override(override).value()
    assert OmegaConf.create({"text": parsed}).text == text
    assert typed_word(override) == f"prompt.text={text}"


@pytest.mark.parametrize("text", ['"Yes," he said, "no."', "'quoted'", "echo \\${HOME}", "{python}", "a=b, ${x} (y)"])
def test_free_text_reaches_the_configuration(runs, text):
    (config,) = runs(f"prompt.text={text}", f"++prompt.question={text}")
    assert config.prompt.text == config.prompt.question == text
    assert as_config(as_dict(config)) == config


def test_quoted_and_plain_paths_of_a_sweep(runs):
    configs = runs("--multirun", "out=\"a,b\",it's,'c\\${d}'")
    assert [config.out for config in configs] == ["a,b", "it's", "c${d}"]


def test_null_in_a_sweep_of_paths_is_no_path(runs):
    assert [config.prompt.file for config in runs("--multirun", "prompt.file=null,a", "out=x")] == [None, "a"]


def test_one_path_that_begins_and_ends_with_quotes_is_that_path(runs):
    assert [config.out for config in runs("""out="a" and "b".json""", """prompt.file='x' + 'y'""")] == [
        '"a" and "b".json'
    ]


def test_three_question_marks_are_refused(refused):
    assert "prompt.text=??? means that no value is given" in refused(generate, print, "prompt.text=???")


def test_home_folder_is_the_same_for_checks_and_writers(runs, refused, monkeypatch, tmp_path):
    """A shell leaves the ``~`` in out=~/x to the command.  The cache's default is compared between users."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (config,) = runs("out=~/a${b}.json", "prompt.file='~/c,d'", "prompt.text=~/e", "model.cache=~/f")
    assert (config.out, config.prompt.file) == (f"{tmp_path}/a${{b}}.json", f"{tmp_path}/c,d")
    assert (config.prompt.text, config.model.cache) == ("~/e", "~/f")
    assert [config.out for config in runs("--multirun", "out=~/a,b")] == [f"{tmp_path}/a", "b"]
    assert expand_home(OmegaConf.create({"prompt": ["~/x"]})) == {"prompt": ["~/x"]}, "no section: it is refused later"
    line = refused(generate, generate.task, "out=~nobody-here/a.json", "prompt.text=hello")
    assert "out=~nobody-here/a.json is in the home folder of an unknown user" in line
    assert "out=./~nobody-here/a.json" in line


@pytest.mark.parametrize("path", ["a", "a,b", '"a"', "'a', \"b\"", "${x}"])
def test_path_word_is_read_as_the_path(runs, path):
    assert [config.out for config in runs(path_word("out", path))] == [path]


@pytest.mark.parametrize("group", GROUPS_WITH_BASES)
def test_bases_cannot_be_chosen(group):
    """Bases only hold what the choices share, and no list of choices names them."""
    for base in (file.stem for file in (CONFIGS / group).glob("_*.yaml")):
        assert base not in choices(group)
        with pytest.raises(ValueError, match=f"{group}={base}") as refusal:
            as_overrides("pretrain", [f"{group}={base}"], print)
        assert all(name in str(refusal.value) for name in choices(group) if name != "folder")


def test_bases_exist_in_the_groups_of_models_and_data():
    assert {"model", "data"} <= set(GROUPS_WITH_BASES)


def test_a_base_is_refused_before_anything_starts(refused):
    assert "data=_base only holds defaults" in refused(pretrain, pretrain.task, "data=_base", "out=a")
    assert "model=_base is unknown: use gemma3_270m, llama2_13b, " in refused(
        pretrain, pretrain.task, "model=_base", "out=a"
    )


@pytest.mark.parametrize("word", ["reduce=int8", "reduce.mlp=bfloat16"])
def test_rounded_reductions_are_refused_in_training(refused, word):
    name = word.partition("=")[0]
    line = refused(pretrain, pretrain.task, "experiment=pretrain/tiny", word, "out=a")
    assert f"there is no setting {name} here: rounded reductions are for generate, chat and eval" in line
    assert "not tested in training; leave it out" in line


def test_every_experiment_belongs_to_a_recipe():
    """The folder of an experiment is the name of the configuration that it is for."""
    for name in choices("experiment"):
        recipe = name.rpartition("/")[0]
        assert (CONFIGS / f"{recipe}.yaml").is_file(), f"configs/experiment/{name}.yaml"
        assert name in experiments_of(recipe)
        assert as_overrides(recipe, [f"experiment={name}"], print) == [f"experiment={name}"]


@pytest.mark.parametrize("recipe", ["generate", "pretrain", "extend", "evaluate", "eval_speed"])
def test_experiments_of_another_recipe_are_refused_with_those_that_fit(recipe):
    fitting = experiments_of(recipe)
    strangers = set(choices("experiment")) - set(fitting)
    assert fitting and strangers
    for stranger in strangers:
        with pytest.raises(ValueError, match=f"experiment={stranger} does not fit {recipe}: use {', '.join(fitting)}$"):
            as_overrides(recipe, [f"experiment={stranger}"], print)


@pytest.mark.parametrize("recipe", [chat, export])
def test_recipe_without_experiments_refuses_each(refused, recipe):
    name = recipe.__name__.removeprefix("recipes.")
    line = refused(recipe, recipe.task, "experiment=generate/demo")
    assert f"experiment=generate/demo does not fit {name}: this recipe has no experiments, leave it out" in line


def test_an_experiment_of_pretraining_fits_extend():
    assert "pretrain/tiny" in experiments_of("extend")
