"""Settings of slurm.submit: which words are its own, their defaults, and Slurm's notation of time."""

import pytest

from slurm.settings import Launcher, SubmitSettings, read_settings, seconds_of, split_words


def test_defaults_of_the_yaml_are_those_of_the_dataclasses():
    assert read_settings(["recipe=generate"]) == (SubmitSettings(recipe="generate"), Launcher())


def test_words_are_split_between_slurm_and_the_recipe():
    words = ["recipe=pretrain", "nodes=2", "launcher=local", "launcher.qos=low", "folder=x", "steps=3", "+time.x=1"]
    assert split_words(words) == (
        ["recipe=pretrain", "nodes=2", "launcher=local", "launcher.qos=low", "folder=x", "+time.x=1"], ["steps=3"]
    )  # fmt: skip


@pytest.mark.parametrize("word", ["run.threads=2", "++run.threads=2", "run=gpu", "run=local,gpu", "hydra.verbose=true"])
def test_group_run_is_the_recipe_s(word, capsys):
    assert split_words([word]) == ([], [word]) and not capsys.readouterr().err


@pytest.mark.parametrize("value", ["outputs/x", "a, b", ""])
def test_run_with_a_folder_is_the_old_name_of_folder(value, capsys):
    assert split_words([f"run={value}"]) == ([f"folder={value}"], [])
    assert capsys.readouterr().err == f"run={value} is an old name: use folder={value}\n"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("7", 420), ("7:05", 425), ("01:02:03", 3723), ("2-3", 183600), ("2-03:04", 183840), ("1-0:0:1", 86401), ("x", 0)],
)
def test_seconds_of_slurm_s_notation(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("typed", "container"),
    [
        ("'/opt/my apps/apptainer' exec '/img/my image.sif'", "'/opt/my apps/apptainer' exec '/img/my image.sif'"),
        ('"/opt/a b" exec "/img/c, d"', '"/opt/a b" exec "/img/c, d"'),
        ("'apptainer exec image.sif'", "apptainer exec image.sif"),
        ("env A=1", "env A=1"),
    ],
)
def test_container_may_have_quoted_words(typed, container):
    """Quotes around the whole value are Hydra's; others are the shell's."""
    assert read_settings(["recipe=generate", f"launcher.container={typed}"])[1].container == container
