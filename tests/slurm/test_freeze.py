"""The frozen source has all files of the checkout, whatever their names, also without git."""

import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import cache_from_source

import pytest

from slurm import freeze

STRANGE = os.fsdecode(b"\xe9.py")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with a tracked page and module, and an untracked module whose name is not UTF-8."""
    root = tmp_path / "root"
    for name in ("recipes/a.py", "page.md", STRANGE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name if name != STRANGE else "")
    for words in ("init -q", "add recipes page.md"):
        subprocess.run(["git", "-C", str(root), *words.split()], check=True)
    monkeypatch.setattr(freeze, "ROOT", root)
    return root


def test_file_whose_name_is_not_utf8_is_frozen(checkout, tmp_path):
    freeze._copy_source(tmp_path / "code")
    assert (tmp_path / "code" / STRANGE).is_file() and (tmp_path / "code" / "page.md").read_text() == "page.md"


def test_source_is_frozen_on_a_machine_without_git(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not shutil.which("git")
    freeze._copy_source(tmp_path / "code")
    assert (tmp_path / "code" / "COMMIT").read_text() == "a checkout without git\n"
    assert (tmp_path / "code" / "recipes" / "a.py").is_file()


def test_compiled_files_go_with_their_source_and_are_used(checkout, tmp_path):
    """`recipes/a.py` has other content than its compiled file: Python takes the compiled one, since dates agree."""
    source = checkout / "recipes" / "a.py"
    source.write_text("value = 1")
    py_compile.compile(str(source))
    before = source.stat()
    source.write_text("value = 2")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    freeze._copy_source(tmp_path / "code")
    show = "from recipes import a; print(a.value, a.__file__)"
    words = [sys.executable, "-c", show]
    done = subprocess.run(words, cwd=tmp_path / "code", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(tmp_path / "code" / "recipes" / "a.py")]


def test_compiled_files_elsewhere_are_left_there(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "elsewhere"))
    py_compile.compile(str(checkout / "recipes" / "a.py"), cfile=cache_from_source(str(checkout / "recipes" / "a.py")))
    freeze._copy_source(tmp_path / "code")
    assert (tmp_path / "code" / "recipes" / "a.py").is_file() and not list((tmp_path / "code").rglob("*.pyc"))
