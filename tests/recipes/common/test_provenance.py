"""Provenance of a run: the packages that Python imports; the source, with or without git, whatever its bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.provenance import commit_of, cores, diff_of, package_versions


def add_package(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_are_the_first_on_the_path_without_vendored_copies(tmp_path, monkeypatch):
    before = package_versions()
    add_package(tmp_path / "first", "zipped", "2.0")
    add_package(tmp_path / "second", "zipped", "1.0")
    add_package(tmp_path / "_vendor", "torch", "0.1")
    add_package(tmp_path / "_vendor", "hidden", "0.1")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path, str(tmp_path / "second")])
    monkeypatch.syspath_prepend(tmp_path / "_vendor")
    assert package_versions() == {**before, "zipped": "2.0"}
    assert [name.lower() for name in before] == sorted(name.lower() for name in before)


def test_all_cores_count_where_no_process_is_restricted(monkeypatch):
    """macOS has no function sched_getaffinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with the committed file README."""
    (tmp_path / "README").write_text("a\n")
    for words in ("init -q", "add README", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    return tmp_path


def test_changed_file_that_is_not_utf8_is_part_of_the_source(checkout):
    clean = commit_of(checkout)
    commits = []
    for content in (b"\xe9\n", b"\xe8\n"):
        (checkout / "README").write_bytes(content)
        commits.append(commit_of(checkout))
    assert "+\\xe8\n" in diff_of(checkout)
    assert len(set(commits)) == 2 and all(commit.startswith(f"{clean}-dirty-") for commit in commits)


def test_checkout_on_a_machine_without_git_has_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout) == "a checkout without git" and diff_of(checkout) == ""
