"""The frozen source has all files of the checkout, whatever their names, also without git."""

import os
import shutil
import subprocess

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
