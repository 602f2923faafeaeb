"""Package versions of a run are those that Python imports, whatever else is on its path."""

import os
import sys
from pathlib import Path

from recipes.common.provenance import cores, package_versions


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
