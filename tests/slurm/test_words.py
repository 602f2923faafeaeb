"""The user's words in the job script of slurm.submit: as typed, whatever they contain; sweeps; old names."""

import os
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.common.cli import compose_config
from recipes.common.overrides import as_overrides
from slurm import submit
from slurm.plan import JobPlan
from slurm.render import script_of
from tests.slurm.conftest import TINY
from tests.tiny import tiny_model


def test_free_text_reaches_the_recipe_unchanged(script, tmp_path):
    """bash and then Hydra read the script's words as what was typed; an out with a comma is one path, no sweep."""
    text = """it's "a" (long), $HOME; `x` \\ text = 1"""
    shown = script("recipe=generate", "model=smollm2_135m", f"prompt.text={text}", "folder=run, (1) 'a'")
    (words,) = re.findall(r"^words=\(.*?^\)$", shown, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", words + '\nprintf "%s\\n" "${words[@]}"'], capture_output=True, text=True, check=True
    )
    config = compose_config("generate", as_overrides("generate", done.stdout.splitlines(), print))
    assert config.prompt.text == text and config.out == f"{tmp_path}/run, (1) 'a'/result.json"


HOSTILE = st.lists(st.sampled_from(["{python}", "{command}", "{run}", "${x}", "$(x)", *"'\"\\`;&{}\n #é"])).map("".join)


@settings(max_examples=30)
@given(texts=st.lists(HOSTILE, min_size=1, max_size=3))
def test_hostile_words_are_in_the_script_as_typed(texts):
    words = tuple(f"prompt.text={text}" for text in texts)
    plan = replace(_hostile_plan(), words=words)
    (lines,) = re.findall(r"^words=\(.*?^\)$", script_of(plan, Path("/work"), "abc"), re.MULTILINE | re.DOTALL)
    printed = subprocess.run(
        ["bash", "-c", lines + '\nprintf "%s\\0" "${words[@]}"'], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split("\0")[:-1] == [*words, "out=/run"]


@cache
def _hostile_plan() -> JobPlan:
    (plan,) = submit.make_plans([*TINY, "folder=/run", "dry_run=true"])
    return plan


def test_other_values_of_a_script_are_as_given(script, tmp_path):
    """Slurm replaces %a and %j in the names of logs, but not in the options' values."""
    shown = script(*TINY, "folder={python} 100%a", "name={work} %j", "launcher.setup=['echo {command}']",
                   "launcher.sbatch=['--comment=a b',\"--constraint='[x|y]'\",--exclusive]")  # fmt: skip
    assert f"\nrun='{tmp_path}/{{python}} 100%a'\n" in shown and "\necho {command}\n" in shown
    assert f"\n#SBATCH --output='{tmp_path}/{{python}} 100%%a/job.log'\n" in shown
    assert "\n#SBATCH --job-name='{work} %j'\n" in shown and "\n#SBATCH --comment='a b'\n" in shown
    assert "\n#SBATCH --constraint='[x|y]'\n" in shown and "\n#SBATCH --exclusive\n" in shown


@pytest.mark.parametrize("key", ["name", "folder", "launcher.container"])
def test_line_break_in_an_option_of_sbatch_is_refused(refused, key):
    assert f"{key}=" in (line := refused(*TINY, f"{key}=a\necho b")) and "has a line break" in line


def test_folder_that_python_cannot_search_is_refused(refused):
    """The job would run the installed code, not its copy."""
    assert "run: 1: Python reads : as the end of a folder's name" in refused(*TINY, "folder=run: 1")


def test_sweep_is_an_array_with_an_out_for_each_run(script, tmp_path):
    shown = script(*TINY, "optim.lr=1e-3,3e-4", "seed=0,1", "folder=run", "parallel=2")
    assert "#SBATCH --array=0-3%2\n" in shown and f"#SBATCH --output={tmp_path}/run/%a/job.log\n" in shown
    assert f"  2) words+=(optim.lr=0.0003 seed=0 out={tmp_path}/run/2) ;;\n" in shown
    assert "optim.lr" not in shown.partition("case")[0].partition("words=")[2]
    # Started by hand, the script needs the number of a run.
    (tmp_path / "job.sbatch").write_text(shown)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_ARRAY_TASK_ID"}
    command = ["bash", str(tmp_path / "job.sbatch")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "set the run of the sweep: SLURM_ARRAY_TASK_ID=0" in done.stderr


def test_runs_of_a_sweep_save_sessions_of_their_own(script, tmp_path):
    (tmp_path / "turns.jsonl").write_text('{"text": "a"}\n')
    words = (
        "recipe=chat",
        f"model={tiny_model(tmp_path / 't', 397)}",
        "turns=turns.jsonl",
        "session.save=talk",
        "folder=run",
    )
    shown = script(*words, "max_new_tokens=3,5")
    assert re.search(r"0\) words\+=\(.*session\.save=\S*talk/0", shown)
    assert re.search(r"1\) words\+=\(.*session\.save=\S*talk/1", shown)


@pytest.mark.parametrize("word", ["a,b", "'a,b'", '"a,b"'])
def test_several_partitions_are_one_setting(script, word):
    assert "\n#SBATCH --partition=a,b\n" in script(*TINY, "folder=run", f"launcher.partition={word}")


def test_sweep_may_list_the_out_of_each_run(script, tmp_path):
    shown = script(*TINY, "out=a b,c", "optim.lr=1e-3", "folder=run")
    assert f"#SBATCH --output={tmp_path}/run/%a/job.log\n" in shown
    assert f"  0) words+=('out={tmp_path}/a b') ;;\n  1) words+=(out={tmp_path}/c) ;;\n" in shown
    assert "out=" not in shown.partition("case")[0].partition("words=")[2]


def test_sweep_of_out_gets_a_new_folder_for_its_logs(script, tmp_path):
    shown = script(*TINY, "out=a,b")
    (folder,) = re.findall(r"^run=(.*)$", shown, re.MULTILINE)[:1]
    assert folder.startswith(f"{tmp_path}/outputs/slurm/pretrain-")


def test_quoted_out_with_a_comma_is_one_folder(script, tmp_path):
    shown = script(*TINY, "out='a,b'")
    assert f"\nrun={tmp_path}/a,b\n" in shown and f"\n  'out=\"{tmp_path}/a,b\"'\n" in shown


def test_old_name_of_folder_is_accepted_and_run_threads_reaches_the_recipe(script, tmp_path, capsys):
    submit.main([*TINY, "run=run", "run.timeout_minutes=7", "dry_run=true"])
    old, said = capsys.readouterr()
    assert said == "run=run is an old name: use folder=run\n"
    assert "\n  run.threads=1\n  run.timeout_minutes=7\n" in old
    assert old == script(*TINY, "folder=run", "run.timeout_minutes=7")


def test_old_names_in_a_sweep_are_printed_once(script, capsys):
    submit.main([*TINY, "threads=1", "seed=0,1", "folder=run", "dry_run=true"])
    assert capsys.readouterr().err == "threads=1 is an old name: use run.threads=1\n"
