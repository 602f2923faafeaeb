"""python -m recipes.bench: the list of subjects, the help of each, and the refusal of unknown ones."""

import sys
from pathlib import Path

import pytest

from recipes.bench import __main__ as bench
from recipes.common.overrides import CONFIGS


def test_every_configuration_is_a_subject():
    assert sorted(bench.SUBJECTS) == sorted(Path(file).stem for file in (CONFIGS / "bench").glob("*.yaml"))


@pytest.mark.parametrize("subject", sorted(bench.SUBJECTS))
def test_help_of_a_subject_lists_its_settings(subject, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes.bench"])
    bench.run_benchmark([subject, "--help"])
    out = capsys.readouterr().out
    assert f"python -m recipes.bench {subject}" in out and "Settings, as key=value:" in out
    assert "$CONFIG" not in out


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0)], ids=["nothing", "help"])
def test_subjects_are_listed(words, code, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.run_benchmark(words)
    err = capsys.readouterr().err
    assert leaving.value.code == code
    assert all(f"\n  {subject} " in err for subject in bench.SUBJECTS)


def test_an_unknown_subject_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.run_benchmark(["decoding", "rounds=1"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "decoding is not a benchmark" in err and "use attention, convergence, crossover" in " ".join(err.split())
