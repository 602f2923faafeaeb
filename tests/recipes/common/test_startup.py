"""A command that loads for long says so first; one that starts at once, --help and other ranks print nothing."""

import gc
import os
import subprocess
import sys

import pytest

from recipes import generate
from recipes.common import cli, startup
from recipes.common.cli import exit_on_error


@pytest.fixture
def started(monkeypatch, capsys):
    """``started(*argv, before=f)``: output of `announce_module` for a Python with ``argv``; calls ``before``."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv, before=lambda: None):
        monkeypatch.setattr(startup, "_timer", None)
        monkeypatch.setattr("sys.argv", ["-m", *argv[3:]] if argv[1] == "-m" else list(argv[1:]))
        monkeypatch.setattr("sys.orig_argv", list(argv))
        startup.announce_module()
        before()
        if startup._timer is not None:
            startup._timer.join()
        return capsys.readouterr().err

    monkeypatch.setattr(startup, "_AFTER_S", 0.05)
    yield run
    startup.loaded()


def test_slow_command_says_that_it_is_loading(started):
    assert started("python", "-m", "eval.run", "mesh.ring=2") == "eval.run: loading torch and the recipe's modules\n"


def test_fast_command_says_nothing(started):
    assert started("python", "-m", "recipes.compare", "a", before=startup.loaded) == ""


@pytest.mark.parametrize("argv", [("python", "-m", "recipes.chat", "--help"), ("python", "script.py")])
def test_help_and_other_programs_say_nothing(started, argv):
    assert started(*argv) == ""


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_says_it(started, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert started("python", "-m", "recipes.generate") == ""


def test_recipes_import_no_torch():
    """Importing torch takes seconds; --help and a mistyped command line must not wait for it."""
    names = (
        "generate", "chat", "pretrain", "extend", "export", "calibrate", "compare", "reproduce", "models", "doctor",
        "finetune",
    )  # fmt: skip
    script = (
        f"import sys, slurm.submit, {', '.join(f'recipes.{name}' for name in names)}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("setting", ["mesh.ring=0", "context.chunk=0", "sampling.seed=-1", "model.dtype=float8"])
def test_wrong_section_is_refused_before_modules_are_loaded_for_ranks(refused, monkeypatch, setting):
    monkeypatch.setattr(cli, "warm_up", lambda _: pytest.fail("modules were loaded for ranks"))
    assert setting in refused(generate, generate.task, setting)


@pytest.mark.parametrize(
    "write", [lambda: startup.print_page("help"), lambda: exit_on_error(lambda: print("x", flush=True))]
)
def test_output_that_nobody_reads_ends_quietly(monkeypatch, write):
    """``longctx VERB --help | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as leaving:
            write()
    assert leaving.value.code == 141


def test_garbage_collection_is_rare_until_the_modules_are_loaded():
    """A launcher's rank trains in this process; tensors in reference cycles must be freed as usual."""
    startup.announce("recipes.none")
    during = gc.get_threshold()
    startup.loaded()
    assert during[0] == 50_000 and gc.get_threshold()[0] < 5_000
