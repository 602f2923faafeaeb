"""The installed package: the command longctx runs from any folder, offline, whatever files lie in that folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import longctx
from recipes import __main__ as command
from recipes.common.provenance import commit_of, diff_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("longctx", "recipes", "eval", "slurm", "configs")


@pytest.fixture
def installed(tmp_path):
    """Folder of an environment with the package installed from a wheel, and with this environment's dependencies."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return environment


def test_installed_command_generates_beside_files_of_other_names(installed, tiny, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("eval", "recipes", "random"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the working folder was imported')\n")
    words = ["generate", f"model={tiny}", "mesh.ring=2", "prompt.text=hello", "max_new_tokens=2", "run.threads=1"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(Path.home()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [installed / "bin" / "longctx", *words, "out=result.json"], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((folder / "result.json").read_text())["token_ids"]) == 2
    manifest = json.loads((folder / "result.manifest.json").read_text())
    assert manifest["module"] == "recipes.generate" and f"longctx {longctx.__version__}" in manifest["commit"]


def test_every_module_with_a_command_line_is_a_verb():
    folders = {"recipes": "recipes", "recipes/bench": "recipes", "eval": "eval", "slurm": "slurm"}
    files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    runnable = {
        file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for file in files
        if '\nif __name__ == "__main__":' in file.read_text()
    }
    inner = {"recipes", "recipes.bench.host_call", "recipes.bench.wire", "slurm.failure"}
    assert {module for module, _ in command.VERBS.values()} == runnable - inner


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0)])
def test_verbs_are_listed(monkeypatch, capsys, words, code):
    monkeypatch.setattr("sys.argv", ["longctx", *words])
    with pytest.raises(SystemExit) as leaving:
        command.main()
    assert leaving.value.code == code
    assert re.findall(r"^  (\w+)", capsys.readouterr().out, re.MULTILINE) == list(command.VERBS)


def test_misspelt_verb_is_refused_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["longctx", "generat3", "mesh.ring=2"])
    with pytest.raises(SystemExit) as leaving:
        command.main()
    assert (leaving.value.code, capsys.readouterr().err) == (
        2,
        "error: there is no verb generat3: did you mean generate?\n",
    )


def test_verb_runs_its_module_with_the_other_words(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["longctx", "compare", "only-one"])
    monkeypatch.delitem(sys.modules, "recipes.compare", raising=False)  # runpy warns of a module that is imported
    with pytest.raises(SystemExit) as leaving:
        command.main()
    assert leaving.value.code == 2 and "fewer than two runs to compare" in capsys.readouterr().err
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert not [each for each in timers if not each.finished.is_set()]  # no line about loading comes later


def test_folder_in_the_checkout_of_another_project_has_a_version_but_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "packages").mkdir()
    assert commit_of(tmp_path / "packages") == f"longctx {longctx.__version__}, not a git checkout"
    assert diff_of(tmp_path / "packages") == ""


def test_make_gpu_installs_torch_before_what_compiles_against_it(tmp_path):
    """In one step pip builds flash-attn in an environment without torch, and fails."""
    done = subprocess.run(
        ["make", "-n", "gpu", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    torch, compiled = (
        done.stdout.index(words) for words in ("torch --index-url", "--no-build-isolation flash-attn 'transformer-eng")
    )
    assert 0 < torch < compiled
    assert "flash-attn" not in (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]


@pytest.mark.parametrize(("python", "release"), [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.14", "0.19.2")])
def test_every_python_gets_the_megatron_core_that_is_tested_with_it(python, release):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for requirements in (declared, pinned):
        known = [Requirement(each) for each in requirements]
        fitting = [str(each.specifier) for each in known if each.name == "megatron-core" and applies(each, python)]
        assert fitting == [f"=={release}"]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})
